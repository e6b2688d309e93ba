// The loss of one row: its live slots gathered, and the results put back where they came from.
#include <cmath>
#include <limits>

#include "cpu.hpp"

namespace topk_rkl {

constexpr double INF = std::numeric_limits<double>::infinity();

void loss_row(const Isa& isa, const Matrix& student, const Matrix& ids, const Matrix& values, int64_t row, int64_t k,
              double weight, double temperature, double* work, float* loss, float* g) {
  const int64_t padded = padded_slots(k);
  double *z = work, *w = work + padded, *slot_g = work + 2 * padded, *slot = work + 3 * padded;
  const double inv_t = 1 / temperature;
  int64_t live = 0;
  bool finite = true;
  *loss = 0;
  for (int64_t j = 0; j < k; ++j) {  // all at once, and not one after the other as they are needed
    const int64_t id = load_integer(ids.at(row, j), ids.kind);
    if (id >= 0 && id < student.columns) __builtin_prefetch(student.at(row, id));
  }
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
  for (int64_t i = live; i < padded_slots(live); ++i) z[i] = w[i] = -INF;
  *loss = float(isa.slots_loss(z, w, slot_g, padded_slots(live), inv_t) * weight);
  for (int64_t i = 0; i < live; ++i) g[int64_t(slot[i])] = float(slot_g[i] * weight);
}

}  // namespace topk_rkl
