// The products of a hidden state with the rows of the head that its slots name, and the sum of those rows.
#include <algorithm>
#include <vector>

#include "head_slots.hpp"
#include "parallel.hpp"

namespace topk_rkl {
namespace {

// Calls f for each row, with what one thread keeps.
template <class F>
void for_each_position(const Matrix& head, const Matrix& ids, int threads, F f) {
  threads = int(std::clamp<int64_t>(ids.rows, 1, threads));
  std::vector<HeadSlots> workers(threads, HeadSlots(head, ids, current_isa()));
  for_each_row(ids.rows, threads, 1, [&](int thread, int64_t row) {
    workers[thread].clear();
    f(workers[thread], row);
  });
}

// The first slot from j on whose id the head has.
int64_t next_slot(const HeadSlots& slots, int64_t row, int64_t j) {
  while (j < slots.k() && !slots.has(slots.id(row, j))) ++j;
  return j;
}

}  // namespace

void linear_logits(const LinearLogits& op, int threads) {
  for_each_position(op.head, op.ids, threads, [&](HeadSlots& slots, int64_t row) {
    float* const out = op.out[row];
    std::fill_n(out, slots.k(), 0.0f);
    int64_t j = next_slot(slots, row, 0);
    if (j == slots.k()) return;
    slots.load(op.hidden, row);
    while (j < slots.k()) {
      const int64_t next = next_slot(slots, row, j + 1);
      if (next < slots.k()) slots.prefetch(slots.id(row, next));
      out[j] = slots.product(op.bias, slots.id(row, j));
      j = next;
    }
  });
}

void linear_hidden_grad(const LinearHiddenGrad& op, int threads) {
  for_each_position(op.head, op.ids, threads, [&](HeadSlots& slots, int64_t row) {
    int64_t added = 0;
    for (int64_t j = 0; j < slots.k(); ++j) {
      const int64_t id = slots.id(row, j);
      const float factor = op.g[row][j];
      if (factor == 0 || !slots.has(id)) continue;
      slots.add(id);
      slots.use(added++, factor);
    }
    slots.sum_to(op.out[row]);
  });
}

}  // namespace topk_rkl
