// The dense gradient from K numbers a row: zeros and values in one pass over the output.
#include "launch.hpp"

namespace topk_rkl::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int64_t SPAN = 8192;  // columns of a block

template <class T>
__global__ void scatter_kernel(Matrix g,            // (N, K)
                               Matrix ids,          // (N, K)
                               Vector grad_output,  // (N)
                               Matrix out,          // (N, V)
                               int k, bool unique, int64_t spans) {
  const int64_t row = blockIdx.x / spans, first = blockIdx.x % spans * SPAN;
  const int64_t last = first + SPAN < out.columns ? first + SPAN : out.columns;
  T* to = static_cast<T*>(out.data) + out.offset(row);
  const bool whole = out.step == 1 && reinterpret_cast<uintptr_t>(to + first) % 16 == 0;
  const int64_t packs = whole ? (last - first) / Pack<T>::SIZE : 0;
  for (int64_t i = threadIdx.x; i < packs; i += THREADS) {
    *reinterpret_cast<uint4*>(to + first + i * Pack<T>::SIZE) = {0, 0, 0, 0};
  }
  for (int64_t i = first + packs * Pack<T>::SIZE + threadIdx.x; i < last; i += THREADS) {
    to[i * out.step] = from_float<T>(0.0f);
  }
  __syncthreads();
  const auto scale = float(weight_of(grad_output, row));
  const float* from = static_cast<const float*>(g.data) + g.flat_offset(row);
  for (int j = threadIdx.x; j < k; j += THREADS) {
    const int64_t id = integer_at(ids, row, j);
    if (id < first || id >= last) continue;
    float value = from[j * g.step];
    bool first_of_id = true;
    if (!unique) {  // the first slot of an id stores the sum of all of them
      value = 0;
      for (int other = 0; other < k; ++other) {
        if (integer_at(ids, row, other) != id) continue;
        first_of_id = first_of_id && other >= j;
        value += from[other * g.step];
      }
    }
    // What counts as nothing stays nothing, even times what is not finite.
    if (first_of_id) to[id * out.step] = from_float<T>(value == 0 || scale == 0 ? 0.0f : value * scale);
  }
}

}  // namespace

void scatter(const Matrix& g, const Matrix& ids, const Vector& grad_output, const Matrix& out, int64_t n, int64_t k,
             bool unique, const Where& where) {
  const int64_t spans = (out.columns + SPAN - 1) / SPAN;
  with_kind(out.kind, [&](auto element) {
    launch("scatter_kernel of N = " + std::to_string(n) + ", V = " + std::to_string(out.columns),
           scatter_kernel<decltype(element)>, {n * spans, 1, THREADS}, where, g, ids, grad_output, out, int(k), unique,
           spans);
  });
}

}  // namespace topk_rkl::cuda
