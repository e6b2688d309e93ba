// topk_rkl._cuda: integers for pointers, all checked in topk_rkl/backends/cuda.py. The GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda.hpp"

#if defined(TOPK_RKL_HOST)
#include "host/simt.hpp"
#endif

namespace py = pybind11;
using namespace topk_rkl;

namespace {

// Pointer, kind, columns, stride, step, rows of a slab, stride of the slabs.
using M = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t, int64_t>;
using V = std::tuple<uintptr_t, int, int64_t>;  // pointer, kind, stride
using W = std::tuple<int, uintptr_t>;                             // device, stream

Matrix matrix(const M& x) {
  auto [data, kind, columns, stride, step, slab_rows, slab_stride] = x;
  return {reinterpret_cast<void*>(data), Kind(kind), columns, stride, step, slab_rows, slab_stride};
}

Vector vector(const V& x) {
  auto [data, kind, stride] = x;
  return {reinterpret_cast<void*>(data), Kind(kind), stride};
}

cuda::Where where(const W& x) { return {std::get<0>(x), reinterpret_cast<void*>(std::get<1>(x))}; }

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  const py::call_guard<py::gil_scoped_release> released;
  m.attr("BUILD") = TOPK_RKL_BUILD;
  m.attr("MAX_K") = cuda::MAX_K;
  m.def("select_scratch", [](int64_t n, int64_t vocab, int kind, int64_t k, bool normalize, int device) {
    return cuda::select_scratch(n, vocab, Kind(kind), k, normalize, device);
  });
  m.def(
      "select",
      [](M logits, int64_t n, int64_t k, bool normalize, uintptr_t scratch, uintptr_t ids, uintptr_t values, W at) {
        cuda::select(matrix(logits), n, k, normalize, pointer(scratch), pointer<int32_t>(ids), pointer<float>(values),
                     where(at));
      },
      released);
  m.def(
      "support_loss",
      [](M student, int64_t n, int64_t k, M ids, M values, V weights, double temperature, uintptr_t loss, uintptr_t g,
         W at) {
        cuda::support_loss(matrix(student), n, k, matrix(ids), matrix(values), vector(weights), temperature,
                           pointer<float>(loss), pointer<float>(g), where(at));
      },
      released);
  m.def(
      "select_loss",
      [](M student, M teacher, int64_t n, int64_t k, V weights, double temperature, uintptr_t scratch, uintptr_t loss,
         uintptr_t ids, uintptr_t g, W at) {
        cuda::select_loss(matrix(student), matrix(teacher), n, k, vector(weights), temperature, pointer(scratch),
                          pointer<float>(loss), pointer<int32_t>(ids), pointer<float>(g), where(at));
      },
      released);
  m.def(
      "scatter",
      [](M g, M ids, V grad_output, M out, int64_t n, int64_t k, bool unique, W at) {
        cuda::scatter(matrix(g), matrix(ids), vector(grad_output), matrix(out), n, k, unique, where(at));
      },
      released);
  m.def(
      "linear_loss",
      [](M hidden, M head, int64_t vocab, V bias, int64_t n, int64_t k, M ids, M values, V weights, double temperature,
         double logit_scale, double softcap, uintptr_t loss, uintptr_t g, uintptr_t dhidden, W at) {
        cuda::linear_loss(matrix(hidden), matrix(head), vocab, vector(bias), n, k, matrix(ids), matrix(values),
                          vector(weights), temperature, logit_scale, softcap, pointer<float>(loss), pointer<float>(g),
                          pointer<float>(dhidden), where(at));
      },
      released);
  m.def("linear_weight_grad_scratch", cuda::linear_weight_grad_scratch);
  m.def(
      "linear_weight_grad",
      [](uintptr_t g, M ids, M hidden, int64_t n, int64_t k, int64_t vocab, M dhead, V dbias, uintptr_t scratch, W at) {
        cuda::linear_weight_grad(pointer<float>(g), matrix(ids), matrix(hidden), n, k, vocab, matrix(dhead), vector(dbias),
                          pointer(scratch), where(at));
      },
      released);
#if defined(TOPK_RKL_HOST)
  m.attr("HOST") = true;
  m.def("seed", simt::seed);
  m.def("sites", simt::sites);
  m.def("drop", simt::drop);
  m.def("shorten", simt::shorten);
#else
  m.attr("HOST") = false;
#endif
}
