// The loss of a hidden state, with K rows of the head.
#include <algorithm>
#include <limits>
#include <vector>

#include "head_slots.hpp"
#include "parallel.hpp"
#include "slots.hpp"

namespace topk_rkl {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();

// One thread at work.
class Worker {
 public:
  Worker(const LinearLoss& op, const Isa& isa)
      : op_(op), isa_(isa), head_(op.head, op.ids, isa), slots_(head_.k()), slopes_(head_.k()) {}

  void run(int64_t row) {
    const double weight = op_.weights.value_or_1(row);
    slots_.clear(), head_.clear();
    if (weight != 0) multiply(row);
    op_.loss[row] = float(slots_.solve(isa_, op_.objective, weight));
    float* const g = op_.g[row];
    std::fill_n(g, head_.k(), 0.0f);
    for (int64_t i = 0; i < slots_.live(); ++i) {
      const auto factor = float(slots_.g(i) == 0 ? 0 : slots_.g(i) * slopes_[i]);
      if (factor == 0) continue;
      head_.use(i, factor);
      g[slots_.slot(i)] = factor;
    }
    if (op_.dhidden.data) head_.sum_to(op_.dhidden[row]);
  }

 private:
  // The logits of the live slots.
  void multiply(int64_t row) {
    head_.load(op_.hidden, row);
    for (int64_t j = 0; j < head_.k(); ++j) {
      const int64_t id = head_.id(row, j);
      const double w = load(op_.log_probs.at(row, j), op_.log_probs.kind);
      if (id < 0 || w == -INF) continue;
      if (!head_.has(id)) {
        slots_.leave_out(w);
        continue;
      }
      if (j + 1 < head_.k()) head_.prefetch(head_.id(row, j + 1));
      const double z = head_.product(op_.bias, id);
      slots_.add(j, op_.objective.capped(z, slopes_[slots_.live()]), w);
    }
  }

  const LinearLoss& op_;
  const Isa& isa_;
  HeadSlots head_;
  Slots slots_;
  std::vector<double> slopes_;  // of each live slot's logit
};

}  // namespace

void linear_loss(const LinearLoss& op, int threads) {
  threads = int(std::clamp<int64_t>(op.ids.rows, 1, threads));
  std::vector<Worker> workers(threads, Worker(op, current_isa()));
  for_each_row(op.ids.rows, threads, 1, [&](int thread, int64_t row) { workers[thread].run(row); });
}

}  // namespace topk_rkl
