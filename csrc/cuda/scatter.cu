// The dense gradient from K numbers per row: zeros and values in one pass over the output.
#include "launch.hpp"

namespace topk_rkl::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int64_t SPAN = 8192;  // columns of a block

template <class T>
__global__ void scatter_kernel(Scatter op, int spans) {
  const Matrix& out = op.out;
  const int k = int(op.ids.columns);
  const int64_t row = blockIdx.x / unsigned(spans), first = blockIdx.x % unsigned(spans) * SPAN;
  const int64_t last = first + SPAN < out.columns ? first + SPAN : out.columns;
  T* to = static_cast<T*>(out.data) + out.offset(row);
  const bool whole = out.column_stride == 1 && reinterpret_cast<uintptr_t>(to + first) % 16 == 0;
  const int64_t packs = whole ? (last - first) / Pack<T>::SIZE : 0;
  for (int64_t i = threadIdx.x; i < packs; i += THREADS) {
    *reinterpret_cast<uint4*>(to + first + i * Pack<T>::SIZE) = {0, 0, 0, 0};
  }
  for (int64_t i = first + packs * Pack<T>::SIZE + threadIdx.x; i < last; i += THREADS) {
    to[i * out.column_stride] = from_float<T>(0.0f);
  }
  __syncthreads();
  const auto scale = float(weight_of(op.grad_output, row));
  const float* from = static_cast<const float*>(op.g.data) + op.g.flat_offset(row);
  for (int j = threadIdx.x; j < k; j += THREADS) {
    const int64_t id = integer_at(op.ids, row, j);
    if (id < first || id >= last) continue;
    float value = from[j * op.g.column_stride];
    bool first_of_id = true;
    if (!op.unique) {  // the first slot of an id stores the sum of all of them
      value = 0;
      for (int other = 0; other < k; ++other) {
        if (integer_at(op.ids, row, other) != id) continue;
        first_of_id = first_of_id && other >= j;
        value += from[other * op.g.column_stride];
      }
    }
    // What counts as nothing stays nothing, even times what is not finite.
    if (first_of_id) to[id * out.column_stride] = from_float<T>(value == 0 || scale == 0 ? 0.0f : value * scale);
  }
}

}  // namespace

void scatter(const Scatter& op, const Where& where) {
  const int64_t n = op.ids.rows, spans = (op.out.columns + SPAN - 1) / SPAN;
  with_kind(op.out.kind, [&](auto element) {
    launch("scatter_kernel of N = " + std::to_string(n) + ", V = " + std::to_string(op.out.columns),
           scatter_kernel<decltype(element)>, {n * spans, 1, THREADS}, where, op, int(spans));
  });
}

}  // namespace topk_rkl::cuda
