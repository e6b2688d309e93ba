// topk_rkl._native: integers for pointers, all checked in topk_rkl/backends/native.py. The GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/cpu.hpp"

namespace py = pybind11;
using namespace topk_rkl;

namespace {

// Pointer, kind, columns, stride, step, rows of a slab, stride of the slabs.
using M = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t, int64_t>;
using V = std::tuple<uintptr_t, int, int64_t>;  // pointer, kind, stride

Matrix matrix(const M& x) {
  auto [data, kind, columns, stride, step, slab_rows, slab_stride] = x;
  return {reinterpret_cast<void*>(data), Kind(kind), columns, stride, step, slab_rows, slab_stride};
}

Vector vector(const V& x) {
  auto [data, kind, stride] = x;
  return {reinterpret_cast<void*>(data), Kind(kind), stride};
}

// [form, numbers...], as in topk_rkl/divergence.py, and the place of the mass in its MASSES.
using D = std::vector<double>;

Objective objective(const D& divergence, int mass = 0) {
  Objective at{Form(int(divergence.at(0))), Mass(mass), {}};
  for (size_t i = 1; i < divergence.size() && i < 5; ++i) at.numbers[i - 1] = divergence[i];
  return at;
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  const py::call_guard<py::gil_scoped_release> released;
  m.attr("BUILD") = TOPK_RKL_BUILD;
  m.def("isas", isas);
  m.def("isa", isa);
  m.def("set_isa", set_isa);
  m.def(
      "select",
      [](M logits, int64_t n, int64_t k, bool normalize, int threads, uintptr_t ids, uintptr_t values) {
        select(matrix(logits), n, k, normalize, threads, pointer<int32_t>(ids), pointer<float>(values));
      },
      released);
  m.def(
      "support_loss",
      [](M student, int64_t n, int64_t k, M ids, M values, V weights, double temperature, D divergence, int threads,
         uintptr_t loss, uintptr_t g) {
        support_loss(matrix(student), n, k, matrix(ids), matrix(values), vector(weights), temperature,
                     objective(divergence), threads, pointer<float>(loss), pointer<float>(g));
      },
      released);
  m.def(
      "select_loss",
      [](M student, M teacher, int64_t n, int64_t k, V weights, double temperature, D divergence, int threads,
         uintptr_t loss, uintptr_t ids, uintptr_t g) {
        select_loss(matrix(student), matrix(teacher), n, k, vector(weights), temperature, objective(divergence),
                    threads, pointer<float>(loss), pointer<int32_t>(ids), pointer<float>(g));
      },
      released);
  m.def(
      "tail_logit",
      [](M logits, int64_t n, int64_t k, M ids, double temperature, int threads, uintptr_t out) {
        tail_logit(matrix(logits), n, k, matrix(ids), temperature, threads, pointer<double>(out));
      },
      released);
  m.def(
      "mass_loss",
      [](M student, int64_t n, int64_t k, M ids, M values, V tail, V weights, double temperature, D divergence,
         int mass, int threads, uintptr_t loss, uintptr_t g, uintptr_t others) {
        mass_loss(matrix(student), n, k, matrix(ids), matrix(values), vector(tail), vector(weights), temperature,
                  objective(divergence, mass), threads, pointer<float>(loss), pointer<float>(g),
                  pointer<double>(others));
      },
      released);
  m.def(
      "mass_grad",
      [](M g, M ids, M others, V grad_output, M student, M out, int64_t n, int64_t k, double temperature, int threads) {
        mass_grad(matrix(g), matrix(ids), matrix(others), vector(grad_output), matrix(student), matrix(out), n, k,
               temperature, threads);
      },
      released);
  m.def(
      "scatter",
      [](M g, M ids, V grad_output, M out, int64_t n, int64_t k, bool unique, int threads) {
        scatter(matrix(g), matrix(ids), vector(grad_output), matrix(out), n, k, unique, threads);
      },
      released);
  m.def(
      "linear_loss",
      [](M hidden, M head, int64_t vocab, V bias, int64_t n, int64_t k, M ids, M values, V weights, double temperature,
         double logit_scale, double softcap, D divergence, int threads, uintptr_t loss, uintptr_t g,
         uintptr_t dhidden) {
        linear_loss(matrix(hidden), matrix(head), vocab, vector(bias), n, k, matrix(ids), matrix(values),
                    vector(weights), temperature, logit_scale, softcap, objective(divergence), threads,
                    pointer<float>(loss), pointer<float>(g), pointer<float>(dhidden));
      },
      released);
  m.def(
      "linear_weight_grad",
      [](M g, M ids, M hidden, int64_t n, int64_t k, int64_t vocab, M dhead, V dbias, int threads) {
        linear_weight_grad(matrix(g), matrix(ids), matrix(hidden), n, k, vocab, matrix(dhead), vector(dbias),
                                threads);
      },
      released);
}
