// The loss and its gradient on K slots: gather K student logits, compare, write K numbers.
#include "launch.hpp"
#include "slots.cuh"

namespace topk_rkl::cuda {
namespace {

constexpr int THREADS = 128;

__global__ void support_loss_kernel(SupportLoss op) {
  const int64_t row = blockIdx.x;
  const int k = int(op.ids.columns);
  Shared shared = shared_memory();
  const Slots slots(shared, k);
  const double weight = weight_of(op.weights, row);
  if (weight == 0) return store_zero_row(row, k, op.loss, op.g);
  store_loss_row(op.student, row, slots, k, weight, op.objective.temperature, op.loss, op.g,
                 [&](int j, int64_t& id, double& w) {
                   id = integer_at(op.ids, row, j);
                   w = real_at(op.log_probs, row, j);
                 });
}

}  // namespace

void support_loss(const SupportLoss& op, const Where& where) {
  const int64_t n = op.ids.rows, k = op.ids.columns;
  launch("support_loss_kernel of N = " + std::to_string(n) + ", K = " + std::to_string(k), support_loss_kernel,
         {n, 1, THREADS, shared_bytes<Slots>(int(k))}, where, op);
}

}  // namespace topk_rkl::cuda
