// The reverse KL of one row and its gradient on K slots, by one block in float64, as divergence.slots_loss has it.
#pragma once

#include "device.cuh"

namespace topk_rkl::cuda {

struct Slots {
  double *z, *w;    // (k) the student's logits and the teacher's, -inf on a slot that is empty
  double* of_warp;  // (WARP)

  __host__ __device__ Slots(Shared& shared, int k)
      : z(shared.take<double>(k)), w(shared.take<double>(k)), of_warp(shared.take<double>(WARP)) {}
};

// Of all threads of the block, in an order that only their number decides; then met by a barrier.
template <class Combine>
__device__ double over_block(double x, double* of_warp, Combine combine) {
  for (int distance = WARP / 2; distance > 0; distance /= 2) x = combine(x, __shfl_xor_sync(ALL, x, distance));
  if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
  __syncthreads();
  x = of_warp[0];
  for (int i = 1; i < int(blockDim.x) / WARP; ++i) x = combine(x, of_warp[i]);
  __syncthreads();
  return x;
}

__device__ inline double sum_over_block(double x, double* of_warp) {
  return over_block(x, of_warp, [](double a, double b) { return a + b; });
}

// The largest of x, with -inf as 0, taken from x.
__device__ inline void subtract_largest(double* x, int k, double* of_warp) {
  double top = -INFINITY;
  for (int j = threadIdx.x; j < k; j += blockDim.x) top = fmax(top, x[j]);  // fmax leaves NaN out, the sum will not
  top = over_block(top, of_warp, [](double a, double b) { return fmax(a, b); });
  if (top == -INFINITY) return;
  for (int j = threadIdx.x; j < k; j += blockDim.x) x[j] -= top;
}

__device__ inline double sum_of_exponentials(const double* x, int k, double inv_t, double* of_warp) {
  double sum = 0;
  for (int j = threadIdx.x; j < k; j += blockDim.x) sum += exp(x[j] * inv_t);
  sum = sum_over_block(sum, of_warp);
  return sum == 0 ? 1 : sum;
}

// 0, or NaN where the teacher's logit is NaN or +inf, which spoils the row whether or not the student has the token.
__device__ inline double poison_of(double w) { return w < INFINITY ? 0 : NAN; }

// Calls put(j, gradient) for each slot, and returns the loss, to which each thread adds its poison. Of z and w a thread
// reads only what it wrote.
template <class Put>
__device__ double reverse_kl(const Slots& slots, int k, double inv_t, double poison, Put put) {
  unsigned live = 0;  // a bit for each slot of this thread
  for (int j = threadIdx.x, bit = 0; j < k; j += blockDim.x, ++bit) live |= unsigned(!(slots.w[j] == -INFINITY)) << bit;
  subtract_largest(slots.z, k, slots.of_warp);
  subtract_largest(slots.w, k, slots.of_warp);
  const double p_sum = sum_of_exponentials(slots.z, k, inv_t, slots.of_warp);
  const double q_sum = sum_of_exponentials(slots.w, k, inv_t, slots.of_warp);
  const double shift = log(p_sum) - log(q_sum);
  double sum = poison;
  for (int j = threadIdx.x, bit = 0; j < k; j += blockDim.x, ++bit) {
    const double p = exp(slots.z[j] * inv_t) / p_sum;
    // The difference of the logits is taken first, so that equal logits give 0 and not a rounding error.
    const double ratio = (p == 0 ? 0 : slots.z[j] - slots.w[j]) * inv_t - shift;
    if (live >> bit & 1) sum += p * ratio;
    slots.z[j] = p;
    slots.w[j] = ratio;
  }
  const double loss = sum_over_block(sum, slots.of_warp);
  for (int j = threadIdx.x, bit = 0; j < k; j += blockDim.x, ++bit) {
    put(j, live >> bit & 1 ? slots.z[j] * (slots.w[j] - loss) * inv_t : 0);
  }
  return loss < 0 ? 0 : loss;  // which only rounding makes it
}

// Writes the loss of a row and its gradient, times the weight; slot_of(j, id, w) tells of slot j what it holds.
template <class SlotOf>
__device__ void store_loss_row(const Matrix& student, int64_t row, const Slots& slots, int k, double weight,
                               double temperature, float* loss, const Rows<float>& g, SlotOf slot_of) {
  const int64_t start = student.offset(row);
  double poison = 0;
  for (int j = threadIdx.x; j < k; j += blockDim.x) {
    int64_t id;
    double w;
    slot_of(j, id, w);
    const bool live = id >= 0 && id < student.columns && !(w == -INFINITY);
    slots.z[j] = live ? real_at(student.data, student.kind, start + id * student.column_stride) : -INFINITY;
    slots.w[j] = live ? w : -INFINITY;
    if (id >= 0) poison += poison_of(w);
  }
  const auto put = [&](int j, double dz) { g.data[row * k + j] = float(dz * weight); };
  const double row_loss = reverse_kl(slots, k, 1 / temperature, poison, put);
  if (threadIdx.x == 0) loss[row] = float(row_loss * weight);
}

__device__ inline void store_zero_row(int64_t row, int k, float* loss, const Rows<float>& g) {
  for (int j = threadIdx.x; j < k; j += blockDim.x) g.data[row * k + j] = 0;
  if (threadIdx.x == 0) loss[row] = 0;
}

}  // namespace topk_rkl::cuda
