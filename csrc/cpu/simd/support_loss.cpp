// The loss of one row and its gradient on K slots: the mathematics of topk_rkl/divergence.py, in float64, for one
// instruction set.
#include "isa.hpp"
#include "vectors.hpp"

extern "C" double log(double);

namespace topk_rkl::TOPK_RKL_ISA {
namespace {

using Doubles = Vec<double>;
using Longs = Vec<int64_t>;
constexpr int LANES = BYTES / 8;
static_assert(SLOTS % LANES == 0);

double sum_of(Doubles lanes) {
  double sum = 0;
  for (int i = 0; i < LANES; ++i) sum += lanes[i];
  return sum;
}

constexpr double LOG2_E = 0x1.71547652b82fep0;
// log(2) in two parts: the first has so few bits that its product with an integer is exact.
constexpr double LN2_HIGH = 0x1.62e42fefa38p-1, LN2_LOW = 0x1.ef35793c7673p-45;
// A sum with it is rounded to an integer, which its low bits hold.
constexpr double ROUNDER = 0x1.8p52;

// exp(x) of x <= 0, to about one unit in the last place: 2^n times a Taylor polynomial of |r| <= log(2) / 2, whose
// first missing term is below 2e-16. 0 below -708, where float64 soon ends.
Doubles exp_of(Doubles x) {
  constexpr double COEFFICIENTS[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                     1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,
                                     1.0 / 2,         1,              1};
  const Doubles bounded = x < -708.0 ? Doubles{} - 708.0 : x;
  const Doubles rounder = Doubles{} + ROUNDER;
  const Doubles whole = bounded * LOG2_E + rounder;
  const Doubles n = whole - rounder;
  const Doubles r = bounded - n * LN2_HIGH - n * LN2_LOW;
  Doubles p = {};
  for (const double coefficient : COEFFICIENTS) p = p * r + coefficient;
  const Longs exponent = ((Longs)whole - (Longs)rounder) << 52;
  return x < -708.0 ? Doubles{} : (Doubles)((Longs)p + exponent);
}

// The sum of e = exp((x - the largest x) / T), 1 where it is 0; x is left with its largest taken away.
double exponentials(double* x, int64_t n, double inv_t, double* e) {
  Doubles tops = Doubles{} - __builtin_inf(), sums = {};
  for (int64_t i = 0; i < n; i += LANES) tops = larger(tops, load_vec<Doubles>(x + i));
  double top = tops[0];
  for (int i = 1; i < LANES; ++i) top = tops[i] > top ? tops[i] : top;
  if (top == -__builtin_inf()) top = 0;
  for (int64_t i = 0; i < n; i += LANES) {
    const Doubles less = load_vec<Doubles>(x + i) - top, power = exp_of(less * inv_t);
    store_vec(x + i, less);
    store_vec(e + i, power);
    sums += power;
  }
  const double sum = sum_of(sums);
  return sum == 0 ? 1 : sum;
}

}  // namespace

double slots_loss(double* z, double* w, double* g, int64_t n, double inv_t) {
  const double q_sum = exponentials(w, n, inv_t, g), p_sum = exponentials(z, n, inv_t, g);
  const double shift = log(p_sum) - log(q_sum);
  Doubles sums = {};
  for (int64_t i = 0; i < n; i += LANES) {
    const Doubles p = load_vec<Doubles>(g + i) / p_sum;
    // The difference of the logits is taken first, so that equal logits give 0 and not a rounding error.
    const Doubles difference = load_vec<Doubles>(z + i) - load_vec<Doubles>(w + i);
    const Doubles ratio = (p == 0 ? Doubles{} : difference) * inv_t - shift;
    store_vec(g + i, p);
    store_vec(w + i, ratio);
    sums += p * ratio;
  }
  const double loss = sum_of(sums);
  for (int64_t i = 0; i < n; i += LANES) {
    store_vec(g + i, load_vec<Doubles>(g + i) * (load_vec<Doubles>(w + i) - loss) * inv_t);
  }
  return loss < 0 ? 0 : loss;  // which only rounding makes it
}

}  // namespace topk_rkl::TOPK_RKL_ISA
