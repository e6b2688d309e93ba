// The loss and its gradient on K slots: gather K student logits, compare, write K numbers.
#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel.hpp"
#include "slots.hpp"

namespace topk_rkl {

constexpr double INF = std::numeric_limits<double>::infinity();

void Slots::add(int64_t j, double z_j, double w_j) {
  z()[live_] = z_j;
  w()[live_] = w_j;
  finite_ = finite_ && z_j < INF && w_j < INF;  // false of NaN as well
  places_[live_++] = j;
}

void Slots::leave_out(double w_j) { finite_ = finite_ && w_j < INF; }

void Slots::add_row(const Matrix& student, const Matrix& ids, const Matrix& log_probs, int64_t row) {
  const int64_t k = ids.columns;
  double *z = this->z(), *w = this->w(), *all_w = spare();
  load_integers(ids, row, k, columns_.data());
  load_floats(log_probs, row, k, all_w);
  const char* logits = student.at(row);
  const int64_t step = student.column_bytes();
  for (int64_t j = 0; j < k; ++j) {
    const int64_t id = columns_[j];
    if (id < 0 || all_w[j] == -INF) continue;
    if (id >= student.columns) {
      leave_out(all_w[j]);
      continue;
    }
    __builtin_prefetch(logits + id * step);  // all at once: each load would otherwise wait for memory by itself
    columns_[live_] = id;
    w[live_] = all_w[j];
    places_[live_++] = j;
  }
  gather(student, row, columns_.data(), live_, z);
  bool finite = finite_;
  for (int64_t i = 0; i < live_; ++i) finite &= (z[i] < INF) & (w[i] < INF);
  finite_ = finite;
}

double Slots::solve(const Isa& isa, const Objective& objective, double weight) {
  double *z = this->z(), *w = this->w(), *g = this->g();
  if (!finite_) {
    std::fill_n(g, live_, NAN);
    return NAN;
  }
  if (live_ == 0) return 0;
  double loss;
  if (objective.plain()) {
    const int64_t padded = padded_slots(live_);
    for (int64_t i = live_; i < padded; ++i) z[i] = w[i] = -INF;
    loss = isa.slots_loss(z, w, g, padded, 1 / objective.temperature);
  } else {
    loss = divergence(objective, z, w, g, spare(), live_);
  }
  for (int64_t i = 0; i < live_; ++i) g[i] *= weight;
  return loss * weight;
}

void loss_row(const SupportLoss& op, int64_t row, const Isa& isa, Slots& slots) {
  const double weight = op.weights.value_or_1(row);
  slots.clear();
  if (weight != 0) slots.add_row(op.student, op.ids, op.log_probs, row);
  op.loss[row] = float(slots.solve(isa, op.objective, weight));
  float* const g = op.g[row];
  std::fill_n(g, op.g.columns, 0.0f);
  for (int64_t i = 0; i < slots.live(); ++i) g[slots.slot(i)] = float(slots.g(i));
}

void support_loss(const SupportLoss& op, int threads) {
  const Isa& isa = current_isa();
  std::vector<Slots> slots(threads, Slots(op.ids.columns));
  for_each_row(op.ids.rows, threads, grain_of(64 * op.ids.columns),
               [&](int thread, int64_t row) { loss_row(op, row, isa, slots[thread]); });
}

}  // namespace topk_rkl
