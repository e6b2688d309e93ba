// The mathematics of topk_rkl/divergence.py on one row, in float64.
#include <cmath>
#include <limits>

#include "cpu.hpp"

namespace topk_rkl {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();

// The sum of exp((x - the largest x) / T), 1 where it is 0; x is left with its largest taken away.
double sum_of_exponentials(double* x, int64_t n, double inv_t) {
  double top = -INF, sum = 0;
  for (int64_t j = 0; j < n; ++j) top = std::fmax(top, x[j]);
  if (top == -INF) top = 0;
  for (int64_t j = 0; j < n; ++j) sum += std::exp((x[j] -= top) * inv_t);
  return sum == 0 ? 1 : sum;
}

}  // namespace

void loss_row(const Matrix& student, const Matrix& ids, const Matrix& values, int64_t row, int64_t k, double weight,
              double temperature, double* work, float* loss, float* g) {
  double *z = work, *w = work + k, *slot = work + 2 * k;
  const double inv_t = 1 / temperature;
  int64_t live = 0;
  bool finite = true;
  *loss = 0;
  for (int64_t j = 0; j < k; ++j) {
    g[j] = 0;
    const int64_t id = load_integer(ids.at(row, j), ids.kind);
    if (weight == 0 || id < 0 || id >= student.columns) continue;
    w[live] = load(values.at(row, j), values.kind);
    if (w[live] == -INF) continue;
    z[live] = load(student.at(row, id), student.kind);
    finite = finite && w[live] < INF && z[live] < INF;  // false of NaN as well
    slot[live++] = double(j);
  }
  if (!finite) {
    *loss = NAN;
    for (int64_t i = 0; i < live; ++i) g[int64_t(slot[i])] = NAN;
    return;
  }
  if (live == 0) return;
  const double p_sum = sum_of_exponentials(z, live, inv_t);
  const double shift = std::log(p_sum) - std::log(sum_of_exponentials(w, live, inv_t));
  double sum = 0;
  // The difference of the logits is taken first, so that equal logits give 0 and not a rounding error.
  for (int64_t i = 0; i < live; ++i) {
    const double p = std::exp(z[i] * inv_t) / p_sum;
    w[i] = (p == 0 ? 0 : z[i] - w[i]) * inv_t - shift;
    z[i] = p;
    sum += p * w[i];
  }
  *loss = float(sum * weight);
  for (int64_t i = 0; i < live; ++i) g[int64_t(slot[i])] = float(z[i] * (w[i] - sum) * inv_t * weight);
}

}  // namespace topk_rkl
