// The rows of the head that the slots of one position name, read by one thread.
#pragma once

#include "cpu.hpp"
#include "linear_rows.hpp"
#include "stream.hpp"

namespace topk_rkl {

class HeadSlots {
 public:
  HeadSlots(const Matrix& head, const Matrix& ids, const Isa& isa)
      : head_(head), ids_(ids), isa_(isa), x_(padded_row(head.columns)), sum_(x_), rows_(k()), factors_(k()) {
    if (head.column_stride != 1) copies_.resize(k() * row_bytes());
  }

  int64_t k() const { return ids_.columns; }
  int64_t id(int64_t row, int64_t j) const { return load_integer(ids_.at(row, j), ids_.kind); }
  bool has(int64_t id) const { return id >= 0 && id < head_.rows; }

  // Before the slots of another position.
  void clear() { count_ = 0, used_ = 0; }

  // Takes the hidden state that the next products are of.
  void load(const Matrix& hidden, int64_t row) {
    if (hidden.column_stride != 1) state_.resize(row_bytes());
    const void* state = contiguous(hidden, row, state_.data());
    const float one = 1;
    sum_rows(isa_, hidden.kind, &state, &one, 1, hidden.columns, x_);  // as float32
  }

  // Adds the row of the head and multiplies it. The float32 is what several ranks send each other.
  float product(const Vector& bias, int64_t id) {
    const double z = isa_.head.dot[int(head_.kind)](add(id), x_.data(), head_.columns);
    return float(bias.data ? z + bias[id] : z);
  }

  const void* add(int64_t id) {
    char* const copy = copies_.empty() ? nullptr : copies_.data() + count_ * row_bytes();
    return rows_[count_++] = contiguous(head_, id, copy);
  }

  // The i-th row added has this factor in the sum; a row without one need not even be finite. Called with i ascending.
  void use(int64_t i, float factor) {
    rows_[used_] = rows_[i];
    factors_[used_++] = factor;
  }

  void sum_to(float* out) {
    sum_rows(isa_, head_.kind, rows_.data(), factors_.data(), used_, head_.columns, sum_);
    std::copy_n(sum_.data(), head_.columns, out);
  }

  void prefetch(int64_t id) const {
    if (!has(id) || head_.column_stride != 1) return;
    const int64_t bytes = std::min(AHEAD, head_.columns * size_of(head_.kind));
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(head_.at(id) + i);
  }

 private:
  // Bytes fetched of the next row while one is read; the processor then goes on by itself.
  static constexpr int64_t AHEAD = 4096;

  int64_t row_bytes() const { return head_.columns * 4; }  // of a copy, at most

  const Matrix& head_;
  const Matrix& ids_;
  const Isa& isa_;
  int64_t count_ = 0, used_ = 0;
  std::vector<float> x_, sum_;
  std::vector<const void*> rows_;     // of the head, in the order they were added
  std::vector<float> factors_;        // of those used
  std::vector<char> state_, copies_;  // of the hidden state and of those rows, where columns are apart
};

}  // namespace topk_rkl
