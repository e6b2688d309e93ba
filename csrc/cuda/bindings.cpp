// topk_rkl._cuda, which topk_rkl/backends/cuda.py calls.
#include "../bindings.hpp"

#include <pybind11/stl.h>

#include "cuda.hpp"

#if defined(TOPK_RKL_HOST)
#include "../testing/simt.hpp"
#endif

PYBIND11_MODULE(_cuda, m) {
  using namespace topk_rkl;
  m.attr("BUILD") = TOPK_RKL_BUILD;
  m.attr("MAX_K") = cuda::MAX_K;
  define(m, "select", cuda::select);
  define(m, "select_scratch", cuda::select_scratch);
  define(m, "support_loss", cuda::support_loss);
  define(m, "select_loss", cuda::select_loss);
  define(m, "select_loss_scratch", cuda::select_loss_scratch);
  define(m, "scatter", cuda::scatter);
  define(m, "linear_loss", cuda::linear_loss);
  define(m, "linear_weight_grad", cuda::linear_weight_grad);
  define(m, "linear_weight_grad_scratch", cuda::linear_weight_grad_scratch);
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
