// The slots of one row that are in S, gathered from wherever they are kept, and what comes back to them.
#pragma once

#include "cpu.hpp"

namespace topk_rkl {

// The K slots of a row are padded with -inf to a multiple of SLOTS.
inline int64_t padded_slots(int64_t k) { return (k + SLOTS - 1) / SLOTS * SLOTS; }

class Slots {
 public:
  explicit Slots(int64_t k) : memory_(5 * padded_slots(k)), columns_(k), padded_(padded_slots(k)) {}

  void clear() { live_ = 0, finite_ = true; }
  // Slot j of the row, which is in S, with the logits of student and teacher.
  void add(int64_t j, double z, double w);
  // A slot that the student's vocabulary lacks.
  void leave_out(double w);
  // Those of the k slots of a row that are in S; for slots that hold none yet.
  void add_row(const Matrix& student, const Matrix& ids, const Matrix& values, int64_t row, int64_t k);
  // The loss times the weight. A NaN or +inf on a slot, or of the teacher on one left out, makes everything NaN.
  double solve(const Isa& isa, const Objective& objective, double temperature, double weight);

  int64_t live() const { return live_; }
  int64_t slot(int64_t i) const { return int64_t(part(3)[i]); }
  double g(int64_t i) const { return part(2)[i]; }

 private:
  double* part(int64_t i) { return memory_.data() + i * padded_; }
  const double* part(int64_t i) const { return memory_.data() + i * padded_; }

  std::vector<double> memory_;
  std::vector<int64_t> columns_;
  int64_t padded_, live_ = 0;
  bool finite_ = true;
};

}  // namespace topk_rkl
