// The only file that knows pybind11: arrays in, checked for type, shape and strides; core functions called without
// the interpreter's lock; nothing else. Python (kernels/backends/cpp_backend.py) has checked in words before.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/attention.h"
#include "core/dequant.h"
#include "core/few_rows.h"
#include "core/neurons.h"
#include "core/transpose.h"

namespace py = pybind11;
using Shape = std::vector<int64_t>;

namespace {

std::string words(const Shape& shape) {
  std::string text = "[";
  for (std::size_t n = 0; n < shape.size(); ++n) text += (n ? ", " : "") + std::to_string(shape[n]);
  return text + "]";
}

template <class T>
const char* type_name();
template <>
const char* type_name<float>() { return "float32"; }
template <>
const char* type_name<uint8_t>() { return "uint8"; }
template <>
const char* type_name<uint16_t>() { return "uint16"; }
template <>
const char* type_name<int64_t>() { return "int64"; }
template <>
const char* type_name<double>() { return "float64"; }

// The buffer of anything with the buffer protocol, after checking that it is an array of T of this shape.
template <class T>
py::buffer_info checked(const py::handle& object, const std::string& name, const Shape& shape, bool writable) {
  if (!py::isinstance<py::buffer>(object)) throw py::type_error(name + ": expected an array");
  py::buffer_info info = py::reinterpret_borrow<py::buffer>(object).request(writable);
  if (!info.item_type_is_equivalent_to<T>()) {
    throw py::type_error(name + ": expected " + type_name<T>() + ", got format " + info.format);
  }
  const Shape got(info.shape.begin(), info.shape.end());
  if (got != shape) throw py::value_error(name + ": expected shape " + words(shape) + ", got " + words(got));
  return info;
}

// Its memory; it must be dense.
template <class T>
T* array(const py::handle& object, const std::string& name, const Shape& shape, bool writable = false) {
  const py::buffer_info info = checked<T>(object, name, shape, writable);
  int64_t stride = sizeof(T);
  for (std::size_t n = shape.size(); n-- > 0; stride *= shape[n]) {
    if (shape[n] > 1 && info.strides[n] != stride) throw py::value_error(name + ": expected a dense array");
  }
  return static_cast<T*>(info.ptr);
}

// One call's keyword arguments; `None` is an absent array.
class Arguments {
 public:
  explicit Arguments(const py::dict& values) : values_(values) {}
  py::handle get(const char* name) const {
    if (!values_.contains(name)) throw py::type_error(std::string(name) + ": missing");
    return values_[name];
  }
  bool has(const char* name) const { return !get(name).is_none(); }
  template <class T>
  T value(const char* name) const { return py::cast<T>(get(name)); }
  const float* floats(const char* name, const Shape& shape) const { return array<float>(get(name), name, shape); }
  const float* floats_or_null(const char* name, const Shape& shape) const {
    return has(name) ? floats(name, shape) : nullptr;
  }
  // [heads, tokens, width], whose vectors must be dense and lie after its beginning.
  lmtt::ByHead by_head(const char* name, const Shape& shape) const {
    const py::buffer_info info = checked<float>(get(name), name, shape, false);
    constexpr int64_t kItem = sizeof(float);
    for (int n = 0; n < 2; ++n) {
      if (info.strides[n] < 0 || info.strides[n] % kItem) throw py::value_error(std::string(name) + ": misplaced rows");
    }
    if (shape[2] > 1 && info.strides[2] != kItem) throw py::value_error(std::string(name) + ": expected dense rows");
    return {static_cast<const float*>(info.ptr), info.strides[0] / kItem, info.strides[1] / kItem};
  }
  float* output(const char* name, const Shape& shape) const { return array<float>(get(name), name, shape, true); }
  Shape shape(const char* name, std::size_t dimensions) const {
    if (!py::isinstance<py::buffer>(get(name))) throw py::type_error(std::string(name) + ": expected an array");
    const py::buffer_info info = py::reinterpret_borrow<py::buffer>(get(name)).request();
    if (info.shape.size() != dimensions) {
      throw py::value_error(std::string(name) + ": expected " + std::to_string(dimensions) + " dimensions, got " +
                            std::to_string(info.shape.size()));
    }
    return Shape(info.shape.begin(), info.shape.end());
  }

 private:
  const py::dict& values_;
};

void expect(bool fact, const char* text) {
  if (!fact) throw py::value_error(text);
}

int threads_of(const Arguments& a) {
  const int threads = a.value<int>("threads");
  expect(threads >= 1 && threads <= 4096, "threads: expected 1 to 4096");
  return threads;
}

// The parts beside pairs or neurons. `others` owns the pointers that the result refers to.
lmtt::Parts parts_of(const Arguments& a, const char* residual, int64_t T, int64_t D,
                     std::vector<const float*>& others) {
  lmtt::Parts p{};
  p.T = T, p.D = D;
  p.whole = a.floats("whole", {T, D});
  p.residual = a.floats(residual, {T, D});
  if (a.has("bias")) {
    const bool one = py::reinterpret_borrow<py::buffer>(a.get("bias")).request().ndim == 1;
    p.bias = one ? a.floats("bias", {D}) : a.floats("bias", {T, D});
    p.bias_stride = one ? 0 : D;
  }
  for (const py::handle& other : a.get("others")) others.push_back(array<float>(other, "others", {T, D}));
  p.n_others = static_cast<int64_t>(others.size());
  p.others = others.data();
  return p;
}

// Seconds of the calling thread, by the names that lmtt.profile.clock gives phases.
py::dict seconds_of(const lmtt::Stages& stages) {
  py::dict result;
  result["screening"] = stages.screening, result["exact evaluation"] = stages.evaluation;
  result["reduction"] = stages.reduction;
  return result;
}

// value(row) of every row as an array of T in a bytearray: what lists hold goes to Python by columns.
template <class T, class Row, class Value>
py::bytearray column(const std::vector<Row>& rows, const Value& value) {
  py::bytearray out(static_cast<const char*>(nullptr), rows.size() * sizeof(T));
  char* to = PyByteArray_AS_STRING(out.ptr());
  for (const Row& row : rows) {
    const T one = value(row);
    std::memcpy(to, &one, sizeof(T));
    to += sizeof(T);
  }
  return out;
}

py::dict attention(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  lmtt::AttentionInput in{};
  const Shape q = a.shape("q", 3), k = a.shape("k", 3), v = a.shape("v", 3), w = a.shape("w_o", 3);
  in.H = q[0], in.T = q[1], in.E = q[2], in.H_kv = k[0], in.E_v = v[2];
  const int64_t T = in.T, H = in.H, D = w[0];
  expect(T >= 1 && H >= 1 && in.E >= 1 && in.E_v >= 1 && D >= 1, "empty axis");
  expect(in.H_kv >= 1 && H % in.H_kv == 0, "k: heads must divide those of q");
  expect(T < int64_t(1) << 24 && H < int64_t(1) << 20, "too many tokens or heads");
  in.q = a.by_head("q", {H, T, in.E}), in.k = a.by_head("k", {in.H_kv, T, in.E});
  in.v = a.by_head("v", {in.H_kv, T, in.E_v}), in.w_o = a.floats("w_o", {D, H, in.E_v});
  in.scale = a.value<float>("scale");
  in.softcap = a.has("softcap") ? a.value<float>("softcap") : 0;
  in.window = a.has("window") ? a.value<int64_t>("window") : T;
  expect(in.window >= 1, "window: expected at least 1");
  in.sinks = a.floats_or_null("sinks", {H});
  for (const char* name : {"mask", "allowed"}) {
    if (!a.has(name)) continue;
    const int64_t heads = a.shape(name, 3)[0];
    expect(heads == 1 || heads == H, "mask: expected 1 or H heads");
    in.mask_stride = heads == 1 ? 0 : T * T;
    if (std::strcmp(name, "mask") == 0) {
      in.mask = a.floats(name, {heads, T, T});
    } else {
      in.allowed = array<uint8_t>(a.get(name), name, {heads, T, T});
    }
  }
  expect(!(in.mask && in.allowed), "mask: expected one of two kinds");
  in.alibi = a.floats_or_null("alibi", {H}), in.lse = a.floats_or_null("lse", {H, T});
  in.row_scale = a.floats_or_null("row_scale", {T}), in.gate = a.floats_or_null("gate", {T, H, in.E_v});
  std::vector<const float*> others;
  in.parts = parts_of(a, "resid_pre", T, D, others);
  in.screen = a.value<double>("screen"), in.max_certificate = a.value<double>("max_certificate");
  in.keep_pairs = a.has("keep");
  in.keep = in.keep_pairs ? a.value<float>("keep") : 0;
  in.workspace = a.value<int64_t>("workspace");
  in.threads = threads_of(a);

  lmtt::AttentionOutput out{};
  out.edges = a.output("edges", {T, T}), out.per_head = a.output("per_head", {T, H});
  out.residual = a.output("out_residual", {T}), out.bias = a.output("out_bias", {T});
  out.others = a.output("out_others", {T, in.parts.n_others});
  out.normaliser = a.output("normaliser", {T}), out.certificate = a.output("certificate", {T});
  out.checksum = a.output("checksum", {T});
  {
    const py::gil_scoped_release unlocked;
    lmtt::attention_contributions(in, out);
  }
  py::dict result;
  result["evaluated"] = out.evaluated, result["positive"] = out.positive;
  result["reevaluated"] = out.reevaluated;
  result["seconds"] = seconds_of(out.stages);
  result["kept"] = py::make_tuple(column<int64_t>(out.kept, [](const auto& pair) { return pair.destination; }),
                                  column<int64_t>(out.kept, [](const auto& pair) { return pair.source; }),
                                  column<int64_t>(out.kept, [](const auto& pair) { return pair.head; }),
                                  column<float>(out.kept, [](const auto& pair) { return pair.share; }));
  int64_t before = 0;
  result["kept_edges"] =
      py::make_tuple(column<int64_t>(out.kept_edges, [](const auto& edge) { return edge.destination; }),
                     column<int64_t>(out.kept_edges, [](const auto& edge) { return edge.source; }),
                     column<float>(out.kept_edges, [](const auto& edge) { return edge.share; }),
                     column<int64_t>(out.kept_edges, [&before](const auto& edge) {
                       return std::exchange(before, before + edge.pairs);
                     }));
  return result;
}

py::dict neurons(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  lmtt::NeuronInput in{};
  const Shape act = a.shape("act", 2);
  in.T = act[0], in.F = act[1];
  const int64_t T = in.T, F = in.F, D = a.shape("whole", 2)[1];
  expect(T >= 1 && F >= 1 && D >= 1, "empty axis");
  expect(T < int64_t(1) << 31 && F < int64_t(1) << 31, "too many tokens or neurons");
  in.act = a.floats("act", {T, F}), in.stored = a.floats_or_null("stored", {D, F});
  in.rows = in.stored ? a.output("w_down", {F, D}) : const_cast<float*>(a.floats("w_down", {F, D}));
  in.row_scale = a.floats_or_null("row_scale", {T});
  in.k = a.value<int64_t>("k");
  expect(in.k >= 1 && in.k <= F, "k: expected 1 to the number of neurons");
  std::vector<const float*> others;
  in.parts = parts_of(a, "base", T, D, others);
  in.screen = a.value<double>("screen");
  in.workspace = a.value<int64_t>("workspace");
  in.threads = threads_of(a);

  lmtt::NeuronOutput out{};
  out.index = array<int64_t>(a.get("index"), "index", {T, in.k}, true);
  out.value = a.output("value", {T, in.k});
  out.residual = a.output("out_residual", {T}), out.bias = a.output("out_bias", {T});
  out.others = a.output("out_others", {T, in.parts.n_others});
  out.normaliser = a.output("normaliser", {T}), out.certificate = a.output("certificate", {T});
  out.checksum = a.output("checksum", {T});
  {
    const py::gil_scoped_release unlocked;
    lmtt::neuron_contributions(in, out);
  }
  py::dict result;
  result["evaluated"] = out.evaluated, result["positive"] = out.positive;
  result["seconds"] = seconds_of(out.stages);
  return result;
}

// values[i, n] = max(0, |whole[i]|_1 - |whole[i] - parts[n][i]|_1).
void proximities(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  const Shape shape = a.shape("whole", 2);
  const int64_t T = shape[0], D = shape[1];
  const float* whole = a.floats("whole", shape);
  std::vector<const float*> parts;
  for (const py::handle& part : a.get("parts")) parts.push_back(array<float>(part, "parts", shape));
  const int64_t count = static_cast<int64_t>(parts.size());
  double* values = array<double>(a.get("values"), "values", {T, count}, true);
  const int threads = threads_of(a);
  const py::gil_scoped_release unlocked;
  lmtt::parallel_for(threads, lmtt::panels(T), [&](int64_t p, int) {
    for (int64_t i = p * lmtt::kPanel; i < std::min(T, (p + 1) * lmtt::kPanel); ++i) {
      for (int64_t n = 0; n < count; ++n) {
        lmtt::kernels().proximity(parts[n] + i * D, whole + i * D, D, &values[i * count + n], nullptr);
      }
    }
  });
}

void transpose(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  const Shape shape = a.shape("source", 2);
  const float* from = a.floats("source", shape);
  float* to = a.output("out", {shape[1], shape[0]});
  const int threads = threads_of(a);
  const py::gil_scoped_release unlocked;
  lmtt::transpose(from, shape[0], shape[1], to, threads);
}

// out [n, M] = rows [n, K] stored^T, stored [M, K], n at most kPanel.
void multiply_few_rows(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  const Shape rows = a.shape("rows", 2), stored = a.shape("stored", 2);
  expect(rows[0] >= 1 && rows[0] <= lmtt::kPanel, "rows: expected 1 to 16");
  expect(rows[1] >= 1 && stored[0] >= 1, "empty axis");
  const float *x = a.floats("rows", rows), *w = a.floats("stored", {stored[0], rows[1]});
  float* out = a.output("out", {rows[0], stored[0]});
  const int threads = threads_of(a);
  const py::gil_scoped_release unlocked;
  lmtt::multiply_few_rows(x, static_cast<int>(rows[0]), rows[1], w, stored[0], out, threads);
}

// Blocks of weights (uint8, dense) into floats: float32, or the bits of bfloat16 or float16 as uint16.
void dequantize(const std::string& format, const py::object& blocks, const py::object& out, const std::string& dtype,
                int threads) {
  const lmtt::BlockFormat of = lmtt::block_format(format);
  if (!py::isinstance<py::buffer>(blocks)) throw py::type_error("blocks: expected an array");
  const int64_t size = py::reinterpret_borrow<py::buffer>(blocks).request().size;
  expect(size % of.bytes == 0, "blocks: expected whole blocks");
  expect(threads >= 1 && threads <= 4096, "threads: expected 1 to 4096");
  const int64_t count = size / of.bytes, values = count * of.values;
  const uint8_t* in = array<uint8_t>(blocks, "blocks", {size});
  lmtt::FloatKind kind = lmtt::FloatKind::kFloat32;
  void* to;
  if (dtype == "float32") {
    to = array<float>(out, "out", {values}, true);
  } else {
    expect(dtype == "bfloat16" || dtype == "float16", "dtype: expected float32, bfloat16 or float16");
    kind = dtype == "bfloat16" ? lmtt::FloatKind::kBfloat16 : lmtt::FloatKind::kFloat16;
    to = array<uint16_t>(out, "out", {values}, true);
  }
  const py::gil_scoped_release unlocked;
  lmtt::dequantize(of, kind, in, count, to, threads);
}

py::dict block_formats() {
  py::dict result;
  for (const lmtt::BlockFormat& format : lmtt::block_formats()) {
    result[format.name] = py::make_tuple(format.values, format.bytes);
  }
  return result;
}

py::dict info() {
  py::dict result;
  result["isa"] = lmtt::kernels().name;
  result["available"] = lmtt::available_isas();
  result["compiler"] = __VERSION__;
#if defined(_OPENMP)
  result["threads"] = "openmp";
#else
  result["threads"] = "none";
#endif
  return result;
}

// Multiply-adds in the registers of each of `threads` threads: how many there were, and a result nobody needs.
py::tuple multiply_adds(int64_t rounds, int threads) {
  std::vector<int64_t> done(threads, 0);
  std::vector<float> unused(threads, 0);
  {
    const py::gil_scoped_release unlocked;
    lmtt::parallel_for(threads, threads, [&](int64_t n, int) {
      unused[n] = lmtt::kernels().multiply_add_chain(rounds, &done[n]);
    });
  }
  int64_t all = 0;
  for (const int64_t n : done) all += n;
  return py::make_tuple(all, unused[0]);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of lmtt; see kernels/backends/cpp_backend.py for their use.";
  m.def("attention", &attention, "Fills the given output arrays; returns counts and kept pairs.");
  m.def("neurons", &neurons, "Fills the given output arrays; returns counts.");
  m.def("proximities", &proximities, "Fills `values` [T, n], float64, with the L1 proximities of `parts` to `whole`.");
  m.def("multiply_few_rows", &multiply_few_rows,
        "Fills `out` [n, M] with `rows` [n, K] times the transpose of `stored` [M, K]; n at most 16.");
  m.def("transpose", &transpose, "Fills `out` [n, m] with the transpose of `source` [m, n].");
  m.def("dequantize", &dequantize, py::arg("format"), py::arg("blocks"), py::arg("out"), py::arg("dtype"),
        py::arg("threads"), "Fills `out` with the values of `blocks`.");
  m.def("block_formats", &block_formats, "Names of block formats -> (values, bytes) of a block.");
  m.def("info", &info, "Instruction set in use, those that run here, compiler, threading.");
  m.def("set_isa", &lmtt::set_isa, py::arg("name"), "Uses the named instruction set, or the fastest for 'auto'.");
  m.def("multiply_adds", &multiply_adds, py::arg("rounds"), py::arg("threads"),
        "For benchmarks: runs multiply-adds in registers and returns (their number, a result).");
}
