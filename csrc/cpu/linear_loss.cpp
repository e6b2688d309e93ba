// The loss of a hidden state, with K rows of the head.
#include <algorithm>
#include <limits>
#include <vector>

#include "linear_rows.hpp"
#include "parallel.hpp"
#include "slots.hpp"
#include "stream.hpp"

namespace topk_rkl {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
// Bytes fetched of the next row while one is read; the processor then goes on by itself.
constexpr int64_t AHEAD = 4096;

// One thread at work.
class Worker {
 public:
  Worker(const LinearLoss& op, const Isa& isa)
      : op_(op), isa_(isa), slots_(k()), x_(padded_row(op.head.columns)), sum_(x_), slopes_(k()), rows_(k()),
        factors_(k()) {
    const bool together = op.head.column_stride == 1 && op.hidden.column_stride == 1;
    if (!together) copies_.resize((k() + 1) * row_bytes());
  }

  void run(int64_t row) {
    const double weight = op_.weights.value_or_1(row);
    slots_.clear();
    if (weight != 0) multiply(row);
    op_.loss[row] = float(slots_.solve(isa_, op_.objective, weight));
    float* const g = op_.g[row];
    std::fill_n(g, k(), 0.0f);
    int64_t count = 0;
    for (int64_t i = 0; i < slots_.live(); ++i) {
      const auto factor = float(slots_.g(i) == 0 ? 0 : slots_.g(i) * slopes_[i]);
      if (factor == 0) continue;  // its row of the head need not even be finite
      rows_[count] = rows_[i];
      factors_[count++] = g[slots_.slot(i)] = factor;
    }
    if (!op_.dhidden.data) return;
    sum_rows(isa_, op_.head.kind, rows_.data(), factors_.data(), count, op_.head.columns, sum_);
    std::copy_n(sum_.data(), op_.head.columns, op_.dhidden[row]);
  }

 private:
  // The logits of the live slots.
  void multiply(int64_t row) {
    const void* hidden = contiguous(op_.hidden, row, copies_.data());
    const float one = 1;
    sum_rows(isa_, op_.hidden.kind, &hidden, &one, 1, op_.hidden.columns, x_);  // as float32
    for (int64_t j = 0; j < k(); ++j) {
      const int64_t id = id_of(row, j);
      const double w = load(op_.log_probs.at(row, j), op_.log_probs.kind);
      if (id < 0 || w == -INF) continue;
      if (id >= op_.head.rows) {
        slots_.leave_out(w);
        continue;
      }
      if (j + 1 < k()) prefetch(id_of(row, j + 1));
      const int64_t i = slots_.live();
      rows_[i] = contiguous(op_.head, id, copies_.empty() ? nullptr : copies_.data() + (i + 1) * row_bytes());
      double z = isa_.head.dot[int(op_.head.kind)](rows_[i], x_.data(), op_.head.columns);
      if (op_.bias.data) z += op_.bias[id];
      slots_.add(j, op_.objective.capped(z, slopes_[i]), w);
    }
  }

  int64_t k() const { return op_.ids.columns; }
  int64_t row_bytes() const { return op_.head.columns * 4; }  // of a copy, at most
  int64_t id_of(int64_t row, int64_t j) const { return load_integer(op_.ids.at(row, j), op_.ids.kind); }

  void prefetch(int64_t id) const {
    if (id < 0 || id >= op_.head.rows || op_.head.column_stride != 1) return;
    const int64_t bytes = std::min(AHEAD, op_.head.columns * size_of(op_.head.kind));
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(op_.head.at(id) + i);
  }

  const LinearLoss& op_;
  const Isa& isa_;
  Slots slots_;
  std::vector<float> x_, sum_;
  std::vector<double> slopes_;      // of each live slot's logit
  std::vector<const void*> rows_;   // of the head, of each live slot
  std::vector<float> factors_;      // of those rows
  std::vector<char> copies_;        // of the hidden state and of those rows, where columns are apart
};

}  // namespace

void linear_loss(const LinearLoss& op, int threads) {
  threads = int(std::clamp<int64_t>(op.ids.rows, 1, threads));
  std::vector<Worker> workers(threads, Worker(op, current_isa()));
  for_each_row(op.ids.rows, threads, 1, [&](int thread, int64_t row) { workers[thread].run(row); });
}

}  // namespace topk_rkl
