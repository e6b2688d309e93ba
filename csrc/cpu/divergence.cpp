// The mathematics of topk_rkl/divergence.py on the slots of one row, in float64 and slot by slot. The plain reverse KL
// has simd/support_loss.cpp.
#include <algorithm>
#include <cmath>
#include <limits>

#include "slots.hpp"

namespace topk_rkl {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();

struct Term {
  double value, h;
};

// 0 where the probability is, even if x is infinite.
double times(double probability, double x) { return probability == 0 ? 0 : probability * x; }

struct Blend {
  double log_ratio, part;
};

// Of x and y with d = log x - log y, and B = own x + (1 - own) y: log x - log B, and (1 - own) y / B.
Blend blend(double d, double own) {
  const double other = 1 - own;
  if (own == 0 || own == 1) return {other != 0 ? d : 0, other};  // B is y, or x, and the other may be 0
  const double smaller = std::exp(-std::abs(d));
  const double sum = d < 0 ? other + own * smaller : own + other * smaller;
  return {(d < 0 ? d : 0) - std::log(sum), (d < 0 ? other : other * smaller) / sum};
}

// exp(x / 2), which is finite up to 709: 0 times it stays 0. d times it, twice, reaches inf where d exp(x) d does.
double root_exp(double x) { return std::exp(std::min(x / 2, 709.0)); }

// What exceeds float64 as a number of which many can be added, so that inf - inf does not occur.
double summable(double h) { return std::clamp(h, -1e300, 1e300); }

// (exp(x) - 1) / x of x <= 0, and 1 at 0.
double chord(double x) { return x == 0 ? 1 : std::expm1(x) / x; }

// The divided difference of exp at 0, x and y, for y <= x <= 0.
double second_chord(double x, double y) {
  // The series, within 2e-10, where the difference below would cancel.
  if (y > -0.01) return 1.0 / 2 + (x + y) / 6 + (x * x + x * y + y * y) / 24 + (x + y) * (x * x + y * y) / 120;
  return (chord(x) - std::exp(x) * chord(y - x)) / -y;
}

Term alpha_beta(double alpha, double beta, double d, double log_q) {
  const double r = alpha + beta;
  if (d == -INF) {
    const double limit = std::exp(r * log_q);
    return {beta > 0 && r > 0 ? limit / (beta * r) : INF, beta == 0 && alpha > 0 ? -limit / alpha : 0};
  }
  const double first = beta * d, second = r * d, top = std::max(first, second);
  const double low = std::min({first, second, 0.0}), high = std::max(top, 0.0), middle = first + second - low - high;
  const double of_term = root_exp(r * log_q + high), of_h = root_exp(r * log_q + top);
  return {(d * of_term) * (d * of_term) * second_chord(middle - high, low - high),
          summable((d * of_h) * of_h * chord(-std::abs(alpha * d)))};
}

Term term_of(const Divergence& at, double p, double q, double d, double log_q) {
  const double* x = at.parameters;
  switch (at.family) {
    case Family::reverse: return {times(p, d), times(p, d)};
    case Family::clamped: {
      const double bounded = std::clamp(d, x[0], x[1]);
      return {times(p, bounded), times(p, d >= x[0] && d <= x[1] ? bounded : bounded - 1)};
    }
    case Family::blended: {
      const Blend of_p = blend(d, x[1]), of_q = blend(-d, x[3]);
      const double value = x[0] * times(p, of_p.log_ratio) + x[2] * times(q, of_q.log_ratio);
      const double rise = times(p, of_p.log_ratio + (of_p.part - (1 - x[1])));
      const double fall = (q - p) * of_q.part + p * (of_q.part - (1 - x[3]));
      return {value, x[0] * rise - x[2] * fall};
    }
    default: return alpha_beta(x[0], x[1], d, log_q);
  }
}

// Leaves in e the probabilities and in x what exceeds none: the logits less the largest. Returns the sum before.
double softmax(double* x, int64_t n, double inv_t, double* e) {
  double top = *std::max_element(x, x + n), sum = 0;
  if (top == -INF) top = 0;
  for (int64_t i = 0; i < n; ++i) sum += e[i] = std::exp((x[i] -= top) * inv_t);
  if (sum == 0) sum = 1;
  for (int64_t i = 0; i < n; ++i) e[i] /= sum;
  return sum;
}

}  // namespace

double divergence(const Objective& at, double* z, double* w, double* p, double* q, int64_t n) {
  const double inv_t = 1 / at.temperature;
  const double p_log_sum = std::log(softmax(z, n, inv_t, p)), q_log_sum = std::log(softmax(w, n, inv_t, q));
  const bool head_only = at.mass == Mass::raw || at.mass == Mass::raw_stop_grad;
  const Family family = at.divergence.family;
  const double* x = at.divergence.parameters;
  const double kappa = at.mass != Mass::raw         ? 0
                       : family == Family::reverse ? 1
                                                   : x[0] * (1 - x[1]) - x[2] * (1 - x[3]);
  double loss = 0, sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double d = (z[i] - w[i]) * inv_t - (p_log_sum - q_log_sum);
    Term term = term_of(at.divergence, p[i], q[i], d, w[i] * inv_t - q_log_sum);
    if (head_only) term = i + 1 < n ? Term{term.value, term.h + kappa * p[i]} : Term{0, 0};
    loss += term.value;
    sum += q[i] = term.h;
  }
  for (int64_t i = 0; i < n; ++i) p[i] = z[i] == -INF ? 0 : (q[i] - p[i] * sum) * inv_t;
  const bool lifted = !head_only && family != Family::clamped;
  return lifted && loss < 0 ? 0 : loss;  // which only rounding makes it
}

}  // namespace topk_rkl
