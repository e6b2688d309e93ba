// What is compared on the slots of a row, and how. See topk_rkl/divergence.py for what the numbers mean.
#pragma once

#include <cstdint>

namespace topk_rkl {

enum class Form : int { reverse, clamped, blended, alpha_beta };
enum class Mass : int { renormalized, tail, raw, raw_stop_grad };

struct Objective {
  Form form = Form::reverse;
  Mass mass = Mass::renormalized;
  double numbers[4] = {};

  bool plain() const { return form == Form::reverse && mass == Mass::renormalized; }
};

// The loss over n slots that are all in S and hold neither NaN nor +inf, the last of which is the rest of the vocabulary
// where the mass is not renormalised. Leaves the gradient in p, and spoils z, w and q.
double divergence(const Objective& at, double* z, double* w, double* p, double* q, int64_t n, double inv_t);

}  // namespace topk_rkl
