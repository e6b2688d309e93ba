// topk_rkl._native, which topk_rkl/backends/native.py calls.
#include "../bindings.hpp"

#include <pybind11/stl.h>

#include "cpu.hpp"

PYBIND11_MODULE(_native, m) {
  using namespace topk_rkl;
  m.attr("BUILD") = TOPK_RKL_BUILD;
  m.def("isas", isas);
  m.def("isa", isa);
  m.def("set_isa", set_isa);
  define(m, "select", select);
  define(m, "support_loss", support_loss);
  define(m, "select_loss", select_loss);
  define(m, "scatter", scatter);
  define(m, "tail_logit", tail_logit);
  define(m, "mass_loss", mass_loss);
  define(m, "mass_grad", mass_grad);
  define(m, "linear_loss", linear_loss);
  define(m, "linear_logits", linear_logits);
  define(m, "linear_hidden_grad", linear_hidden_grad);
  define(m, "linear_weight_grad", linear_weight_grad);
}
