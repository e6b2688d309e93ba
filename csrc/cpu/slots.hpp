// The slots of one row that are in S, gathered from wherever they are kept, and what comes back to them.
#pragma once

#include "cpu.hpp"

namespace topk_rkl {

// The K slots of a row are padded with -inf to a multiple of SLOTS.
inline int64_t padded_slots(int64_t k) { return (k + SLOTS - 1) / SLOTS * SLOTS; }

class Slots {
 public:
  explicit Slots(int64_t k) : memory_(4 * padded_slots(k)), columns_(k), places_(k), padded_(padded_slots(k)) {}

  void clear() { live_ = 0, finite_ = true; }
  // Slot j of the row, which is in S, with the logits of student and teacher.
  void add(int64_t j, double z, double w);
  // A slot that the student's vocabulary lacks.
  void leave_out(double w);
  // The slots of a row that are in S; for slots that hold none yet.
  void add_row(const Matrix& student, const Matrix& ids, const Matrix& log_probs, int64_t row);
  // The loss times the weight. A NaN or +inf on a slot, or of the teacher on one left out, makes everything NaN.
  double solve(const Isa& isa, const Objective& objective, double weight);

  int64_t live() const { return live_; }
  int64_t slot(int64_t i) const { return places_[i]; }
  double g(int64_t i) const { return memory_[2 * padded_ + i]; }

 private:
  double* z() { return memory_.data(); }  // the student's logits
  double* w() { return z() + padded_; }   // the teacher's
  double* g() { return w() + padded_; }   // the gradient
  double* spare() { return g() + padded_; }

  std::vector<double> memory_;
  std::vector<int64_t> columns_, places_;  // of each live slot: its id, and which of the K it is
  int64_t padded_, live_ = 0;
  bool finite_ = true;
};

void loss_row(const SupportLoss& op, int64_t row, const Isa& isa, Slots& slots);

// The loss over n slots that are all in S and hold neither NaN nor +inf. The last is the tail where the mass is not
// renormalised. Leaves the gradient in p, and spoils z, w and q.
double divergence(const Objective& at, double* z, double* w, double* p, double* q, int64_t n);

}  // namespace topk_rkl
