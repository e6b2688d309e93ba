// The gradient of the head, and of its bias: pairs (row, slot) are sorted by id, so that each row of the head owns a
// segment of them, which is added up in the order of its pairs and written once, zeros included. No atomics.
//
// A hot id may own a pair of every row. So the aligned windows of WINDOW pairs that lie within one segment are added up
// first, side by side; the block of a segment adds at most WINDOW - 1 pairs at each end and the sums between them.
#include <algorithm>

#include "launch.hpp"
#include "sort.hpp"

namespace topk_rkl::cuda {
namespace {

constexpr int THREADS = 128, EACH = 4;  // columns of a thread
constexpr int COLUMNS = THREADS * EACH;
constexpr int WINDOW = 256;
constexpr int64_t SCRATCH = 48 << 20;  // bytes of the sums of windows, if one block of columns is not more

// One slot with a gradient, and the ids' segments. All but `bounds` are in the order of the ids.
struct Segments {
  const uint32_t* ids;     // (pairs)
  const uint32_t* rows;    // (pairs) of the hidden states
  const float* terms;      // (pairs) their factors
  const uint32_t* bounds;  // (V + 1) where the segment of each id starts
  int64_t pairs, vocab;
};

// A slice of the columns: of what is added up, and of what is written. Without data, a column of ones is added up.
struct Slice {
  Matrix hidden;  // (N, columns)
  Matrix out;     // (V, columns)
  float* sums;    // (windows, columns), written where the window is of one id
};

__global__ void pairs_kernel(LinearWeightGrad op,
                             uint32_t* keys,      // (pairs): the id, or V where it is empty or has no gradient
                             uint32_t* places) {  // (pairs)
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x, vocab = op.vocab();
  if (i >= op.slots()) return;
  const int k = int(op.ids.columns);
  const int64_t id = integer_at(op.ids, i / k, i % k);
  keys[i] = uint32_t(id >= 0 && id < vocab && op.g.data[i] != 0 ? id : vocab);
  places[i] = uint32_t(i);
}

__global__ void gather_kernel(const float* g,          // (N, K)
                              const uint32_t* places,  // (pairs), sorted
                              int64_t pairs, int k,
                              uint32_t* rows,   // (pairs)
                              float* terms) {   // (pairs)
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= pairs) return;
  rows[i] = places[i] / uint32_t(k);
  terms[i] = g[places[i]];
}

__global__ void bounds_kernel(const uint32_t* ids,  // (pairs), sorted
                              int64_t pairs, int64_t vocab,
                              uint32_t* bounds) {  // (V + 1)
  const int64_t id = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (id > vocab) return;
  int64_t low = 0, high = pairs;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ids[middle] < id) low = middle + 1;
    else high = middle;
  }
  bounds[id] = uint32_t(low);
}

template <class T>
struct alignas(EACH * sizeof(T)) Few {
  T at[EACH];
};

// The columns of this thread, as far as there are any.
template <class T>
struct Sum {
  const Slice& slice;
  int64_t first = (int64_t(blockIdx.y) * THREADS + threadIdx.x) * EACH;
  float total[EACH] = {};

  __device__ explicit Sum(const Slice& slice) : slice(slice) {}

  __device__ void add(float term, uint32_t row) {
    const Matrix& hidden = slice.hidden;
    const T* from = static_cast<const T*>(hidden.data) + hidden.flat_offset(row) + first * hidden.column_stride;
    const bool whole = hidden.column_stride == 1 && first + EACH <= hidden.columns;
    if (whole && reinterpret_cast<uintptr_t>(from) % sizeof(Few<T>) == 0) {
      const Few<T> few = *reinterpret_cast<const Few<T>*>(from);
#pragma unroll
      for (int e = 0; e < EACH; ++e) total[e] += term * to_float(few.at[e]);
    } else {
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        if (first + e < hidden.columns) total[e] += term * (hidden.data ? to_float(from[e * hidden.column_stride]) : 1.0f);
      }
    }
  }

  __device__ void add_pairs(const Segments& segments, int64_t start, int64_t end) {
#pragma unroll 4
    for (int64_t i = start; i < end; ++i) add(segments.terms[i], segments.rows[i]);
  }

  __device__ float* window(int64_t i) const { return slice.sums + i * slice.out.columns; }
};

template <class T>
__global__ void __launch_bounds__(THREADS) window_sums_kernel(Segments segments, Slice slice) {
  const int64_t start = int64_t(blockIdx.x) * WINDOW;
  const uint32_t id = segments.ids[start];
  if (id != segments.ids[start + WINDOW - 1] || id >= segments.vocab) return;
  Sum<T> sum(slice);
  sum.add_pairs(segments, start, start + WINDOW);
  for (int e = 0; e < EACH && sum.first + e < slice.out.columns; ++e) sum.window(blockIdx.x)[sum.first + e] = sum.total[e];
}

template <class T>
__global__ void __launch_bounds__(THREADS) segments_kernel(Segments segments, Slice slice) {
  const int64_t id = blockIdx.x, start = segments.bounds[id], end = segments.bounds[id + 1];
  const int64_t first = (start + WINDOW - 1) / WINDOW, last = end / WINDOW;
  Sum<T> sum(slice);
  sum.add_pairs(segments, start, first < last ? first * WINDOW : end);
  for (int64_t i = first; i < last; ++i) {
    for (int e = 0; e < EACH && sum.first + e < slice.out.columns; ++e) sum.total[e] += sum.window(i)[sum.first + e];
  }
  if (first < last) sum.add_pairs(segments, last * WINDOW, end);
  for (int e = 0; e < EACH && sum.first + e < slice.out.columns; ++e) {
    const int64_t at = slice.out.flat_offset(id) + (sum.first + e) * slice.out.column_stride;
    switch (slice.out.kind) {
      case Kind::bfloat16: static_cast<BFloat16*>(slice.out.data)[at] = from_float<BFloat16>(sum.total[e]); break;
      case Kind::float16: static_cast<Float16*>(slice.out.data)[at] = from_float<Float16>(sum.total[e]); break;
      default: static_cast<float*>(slice.out.data)[at] = sum.total[e];
    }
  }
}

// Where everything is in the scratch. Rows and terms take the place of what was sorted.
struct Layout {
  int64_t pairs, windows, slice;  // the last: columns added up at a time
  int64_t keys, places, ids, sorted, bounds, sums, sort, bytes;
  int bits = 0;

  Layout(const LinearWeightGrad& op, int device) : pairs(op.slots()), windows(pairs / WINDOW) {
    const int64_t vocab = op.vocab(), width = op.hidden.columns, blocks = (width + COLUMNS - 1) / COLUMNS;
    slice = std::clamp<int64_t>(SCRATCH / (4 * COLUMNS * std::max<int64_t>(windows, 1)), 1, blocks) * COLUMNS;
    while (vocab >> bits) ++bits;
    int64_t used = 0;
    const auto take = [&](int64_t size) { return std::exchange(used, used + (size + 255) / 256 * 256); };
    for (int64_t* part : {&keys, &places, &ids, &sorted}) *part = take(4 * pairs);
    bounds = take(4 * (vocab + 1));
    sums = take(4 * windows * std::min(slice, width));
    sort = take(sort_scratch({nullptr, nullptr, nullptr, nullptr, pairs, bits}, device));
    bytes = used;
  }
};

template <class T>
void add_up(const Segments& segments, const Matrix& hidden, const Matrix& out, float* sums, const Layout& layout,
            const Where& where) {
  const std::string shape = " of V = " + std::to_string(segments.vocab) + ", H = " + std::to_string(out.columns);
  for (int64_t first = 0; first < out.columns; first += layout.slice) {
    const int64_t columns = std::min(layout.slice, out.columns - first), blocks = (columns + COLUMNS - 1) / COLUMNS;
    const auto part = [&](Matrix x) {
      if (x.data) x.data = x.at(0, first);
      x.columns = columns;
      return x;
    };
    const Slice slice{part(hidden), part(out), sums};
    // The block of columns is the slow index of the grid, so that one block of all hidden states stays in L2.
    launch("window_sums_kernel" + shape, window_sums_kernel<T>, {layout.windows, blocks, THREADS}, where, segments, slice);
    launch("segments_kernel" + shape, segments_kernel<T>, {segments.vocab, blocks, THREADS}, where, segments, slice);
  }
}

}  // namespace

int64_t linear_weight_grad_scratch(const LinearWeightGrad& op, int device) { return Layout(op, device).bytes; }

void linear_weight_grad(const LinearWeightGrad& op, const Where& where) {
  const Layout layout(op, where.device);
  const int64_t k = op.ids.columns, vocab = op.vocab();
  const auto at = [&](int64_t offset) {
    return reinterpret_cast<uint32_t*>(static_cast<char*>(where.scratch) + offset);
  };
  const auto of_all = [](int64_t count) { return Grid{(count + THREADS - 1) / THREADS, 1, THREADS}; };
  const std::string shape = " of N = " + std::to_string(op.ids.rows) + ", K = " + std::to_string(k);
  uint32_t *keys = at(layout.keys), *places = at(layout.places), *sorted_ids = at(layout.ids);
  auto* terms = reinterpret_cast<float*>(keys);
  auto* sums = reinterpret_cast<float*>(at(layout.sums));
  launch("pairs_kernel" + shape, pairs_kernel, of_all(layout.pairs), where, op, keys, places);
  if (layout.pairs) {
    sort_pairs({keys, places, sorted_ids, at(layout.sorted), layout.pairs, layout.bits}, at(layout.sort), where);
  }
  launch("gather_kernel" + shape, gather_kernel, of_all(layout.pairs), where, op.g.data, at(layout.sorted),
         layout.pairs, int(k), places, terms);
  launch("bounds_kernel" + shape, bounds_kernel, of_all(vocab + 1), where, sorted_ids, layout.pairs, vocab,
         at(layout.bounds));
  const Segments segments{sorted_ids, places, terms, at(layout.bounds), layout.pairs, vocab};
  if (op.dhead.data) {
    with_kind(op.hidden.kind, [&](auto element) {
      add_up<decltype(element)>(segments, op.hidden, op.dhead, sums, layout, where);
    });
  }
  if (op.dbias.data) {
    const Matrix ones{nullptr, Kind::float32, op.hidden.rows, 1, 0, 0};
    const Matrix out{op.dbias.data, op.dbias.kind, vocab, 1, op.dbias.stride, 1};
    add_up<float>(segments, ones, out, sums, layout, where);
  }
}

}  // namespace topk_rkl::cuda
