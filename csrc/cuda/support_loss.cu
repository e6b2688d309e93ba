// The loss and its gradient on K slots: gather K student logits, compare, write K numbers.
#include "launch.hpp"
#include "slots.cuh"

namespace topk_rkl::cuda {
namespace {

constexpr int THREADS = 128;

__global__ void support_loss_kernel(Matrix student,  // (N, V)
                                    Matrix ids,      // (N, K)
                                    Matrix values,   // (N, K)
                                    Vector weights,  // (N)
                                    int k, double inv_t,
                                    float* loss,  // (N)
                                    float* g) {   // (N, K)
  const int64_t row = blockIdx.x;
  Shared shared = shared_memory();
  const Slots slots(shared, k);
  const double weight = weight_of(weights, row);
  if (weight == 0) return store_zero_row(row, k, loss, g);
  store_loss_row(student, row, slots, k, weight, inv_t, loss, g, [&](int j, int64_t& id, double& w) {
    id = integer_at(ids, row, j);
    w = real_at(values, row, j);
  });
}

}  // namespace

void support_loss(const Matrix& student, int64_t n, int64_t k, const Matrix& ids, const Matrix& values,
                  const Vector& weights, double temperature, float* loss, float* g, const Where& where) {
  launch("support_loss_kernel of N = " + std::to_string(n) + ", K = " + std::to_string(k), support_loss_kernel,
         {n, 1, THREADS, shared_bytes<Slots>(int(k))}, where, student, ids, values, weights, int(k), 1 / temperature,
         loss, g);
}

}  // namespace topk_rkl::cuda
