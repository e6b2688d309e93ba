// How teacher and student are compared, as topk_rkl/objective.py: the one thing that is no tensor.
#pragma once

#include <cmath>

#include "types.hpp"

namespace topk_rkl {

enum class Family : int { reverse, clamped, blended, alpha_beta };
enum class Mass : int { renormalized, tail, raw, raw_stop_grad };

// See topk_rkl/divergence.py for what the parameters of a family mean.
struct Divergence {
  Family family = Family::reverse;
  double parameters[4] = {};
};

struct Objective {
  double temperature = 1;
  Divergence divergence = {};
  Mass mass = Mass::renormalized;
  double logit_scale = 1, softcap = 0;  // softcap 0 is none

  bool plain() const { return divergence.family == Family::reverse && mass == Mass::renormalized; }

  // The logit that a model makes of a product with its head, and its slope, as divergence.capped.
  TOPK_RKL_BOTH double capped(double raw, double& slope) const {
    const double z = raw * logit_scale;
    slope = logit_scale;
    if (softcap == 0) return z;
    const double bent = tanh(z / softcap);
    slope *= 1 - bent * bent;
    return softcap * bent;
  }
};

}  // namespace topk_rkl
