// What the drivers share: the kernels in use, threads, aligned memory.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "core/kernels.h"

namespace lmtt {

// The kernels chosen for this machine, or by set_isa.
const Kernels& kernels();
std::vector<std::string> available_isas();  // names that run here, the fastest first
// Forces one of them, or with "auto" the fastest. Throws std::invalid_argument for any other name.
void set_isa(const std::string& name);

// Rounding margin of a float32 sum of n products, relative to the sum of their absolute values
// (Higham, Accuracy and Stability of Numerical Algorithms, lemma 3.1), rounded up.
inline double rounding(double n) {
  const double u = 0x1p-24;
  return 1.001 * n * u / (1 - n * u);
}
// Longest chain of roundings in Kernels::multiply over `depth`.
inline double chain(int64_t depth) {
  return double(depth < kDepth ? depth : kDepth) + double((depth + kDepth - 1) / kDepth);
}
// Likewise of Kernels::add_signed: two additions in the table, one for each group of a table, one for each table.
inline double sign_chain(int64_t depth) {
  const int64_t longest = depth < kTableDepth ? depth : kTableDepth;
  return 2 + double(groups(longest)) + double((depth + kTableDepth - 1) / kTableDepth);
}

// Uninitialised floats (or records) on a cache line boundary.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(bytes(n), kAlign))) {}
  T* get() const { return data_.get(); }
  T* operator+(int64_t n) const { return data_.get() + n; }
  T& operator[](int64_t n) const { return data_.get()[n]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  static std::size_t bytes(int64_t n) { return static_cast<std::size_t>(n > 0 ? n : 1) * sizeof(T); }
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<T, Free> data_;
};

// Where the calling thread's time went: disjoint intervals of its own, other threads' work seen as waiting for them.
struct Stages {
  double screening = 0, evaluation = 0, reduction = 0;  // seconds
};

// Seconds since its making, or since the last lap.
class Stopwatch {
 public:
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    const double spent = std::chrono::duration<double>(now - last_).count();
    last_ = now;
    return spent;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// body(item, thread) for every item; threads take the next item when they are free, so no result may depend on
// who takes what. OpenMP, because torch's products use its pool too: one pool does not fight with itself.
// The first exception stops the rest and is thrown again here.
template <class Body>
void parallel_for(int threads, int64_t items, const Body& body) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
  const auto work = [&](int thread) {
    try {
      for (int64_t item; (item = next.fetch_add(1)) < items;) body(item, thread);
    } catch (...) {
      next.store(items);
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
  work(omp_get_thread_num());
#else
  (void)threads;
  work(0);
#endif
  if (error) std::rethrow_exception(error);
}

}  // namespace lmtt
