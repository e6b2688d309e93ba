#include "loss.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace topk_rkl {

constexpr double INF = std::numeric_limits<double>::infinity();

void Slots::add(int64_t j, double z, double w) {
  part(0)[live_] = z;
  part(1)[live_] = w;
  finite_ = finite_ && z < INF && w < INF;  // false of NaN as well
  part(3)[live_++] = double(j);
}

void Slots::leave_out(double w) { finite_ = finite_ && w < INF; }

void Slots::add_row(const Matrix& student, const Matrix& ids, const Matrix& values, int64_t row, int64_t k) {
  double *z = part(0), *w = part(1), *places = part(3), *all_w = part(4);
  load_integers(ids, row, k, columns_.data());
  load_floats(values, row, k, all_w);
  const char* logits = student.at(row);
  const int64_t step = student.step * size_of(student.kind);
  for (int64_t j = 0; j < k; ++j) {
    const int64_t id = columns_[j];
    if (id < 0 || all_w[j] == -INF) continue;
    if (id >= student.columns) {
      leave_out(all_w[j]);
      continue;
    }
    __builtin_prefetch(logits + id * step);  // all at once, and not one after the other as they are needed
    columns_[live_] = id;
    w[live_] = all_w[j];
    places[live_++] = double(j);
  }
  gather(student, row, columns_.data(), live_, z);
  bool finite = finite_;
  for (int64_t i = 0; i < live_; ++i) finite &= (z[i] < INF) & (w[i] < INF);
  finite_ = finite;
}

double Slots::solve(const Isa& isa, const Objective& objective, double temperature, double weight) {
  double *z = part(0), *w = part(1), *g = part(2);
  if (!finite_) {
    std::fill_n(g, live_, NAN);
    return NAN;
  }
  if (live_ == 0) return 0;
  double loss;
  if (objective.plain()) {
    const int64_t padded = padded_slots(live_);
    for (int64_t i = live_; i < padded; ++i) z[i] = w[i] = -INF;
    loss = isa.slots_loss(z, w, g, padded, 1 / temperature);
  } else {
    loss = divergence(objective, z, w, g, part(4), live_, 1 / temperature);
  }
  for (int64_t i = 0; i < live_; ++i) g[i] *= weight;
  return loss * weight;
}

void loss_row(const Isa& isa, const Matrix& student, const Matrix& ids, const Matrix& values, int64_t row, int64_t k,
              double weight, double temperature, const Objective& objective, Slots& slots, float* loss, float* g) {
  slots.clear();
  if (weight != 0) slots.add_row(student, ids, values, row, k);
  *loss = float(slots.solve(isa, objective, temperature, weight));
  std::fill_n(g, k, 0.0f);
  for (int64_t i = 0; i < slots.live(); ++i) g[slots.slot(i)] = float(slots.g(i));
}

}  // namespace topk_rkl
