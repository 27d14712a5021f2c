// Which instruction set the kernels use: the fastest that the machine has, LMTT_ISA, or set_isa.
#include <cstdlib>
#include <stdexcept>

#include "core/support.h"

namespace lmtt {
namespace {

// Compiled in, and present in this processor (and enabled by its operating system, which the builtin checks).
std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // what setup.py lets these files use
  const bool common =
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt");
  if (common && avx512_kernels() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
    all.push_back(avx512_kernels());
  }
  if (common && avx2_kernels() && __builtin_cpu_supports("avx2")) all.push_back(avx2_kernels());
#endif
  all.push_back(portable_kernels());
  return all;
}

const Kernels* find(const std::string& name) {
  std::string known = "auto";
  for (const Kernels* k : usable()) {
    if (name == k->name || name == "auto") return k;
    known += std::string(", ") + k->name;
  }
  throw std::invalid_argument("instruction set (LMTT_ISA), expected one of " + known + ", got " + name);
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : usable()) names.emplace_back(k->name);
  return names;
}

void set_isa(const std::string& name) { chosen = find(name); }

const Kernels& kernels() {
  const Kernels* k = chosen.load();
  if (!k) {
    const char* asked = std::getenv("LMTT_ISA");
    k = find(asked && *asked ? asked : "auto");
    chosen = k;
  }
  return *k;
}

}  // namespace lmtt
