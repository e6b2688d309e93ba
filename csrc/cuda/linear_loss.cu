// The loss from hidden states: a cluster of blocks serves a row of them, each block a slice of H, and reads its part of
// the K rows of the head once, into shared memory, for the logits and for the gradient of the hidden state.
//
// Rows for which there is no room there, and heads whose rows do not lie on 16 bytes, are read twice.
#include <algorithm>

#include "launch.hpp"
#include "slots.cuh"

namespace topk_rkl::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int AHEAD = 4;                   // rows that a warp has in flight
constexpr int EACH = 4;                    // columns of a thread, in the gradient of the hidden state
constexpr int TERMS = 32;                  // added up before they join the sum of the others
constexpr int64_t ROOM = 96 << 10;         // bytes of a block, of which two fit on a processor of sm_90
constexpr int64_t LEAST_SLICE = 256;       // columns
constexpr int MAX_CLUSTER = 8;             // blocks, that every device of sm_90 and later can schedule

// The op, and how its hidden states and heads are cut.
struct Problem {
  LinearLoss op;
  int slice;      // columns of a block
  int kept;       // rows of the head in shared memory: those of the first slots
  bool on_packs;  // its rows can be read 16 bytes at a time

  TOPK_RKL_BOTH int k() const { return int(op.ids.columns); }
};

template <class T>
struct HeadPieces {
  Slots slots;
  double* slope;  // (k)
  float* raw;     // (k) the products with this block's slice
  float* factor;  // (k) the gradient of each slot
  float* x;       // (slice) of the hidden state
  T* rows;        // (kept, slice)

  __host__ __device__ HeadPieces(Shared& shared, int k, int slice, int kept)
      : slots(shared, k), slope(shared.take<double>(k)), raw(shared.take<float>(k)), factor(shared.take<float>(k)),
        x(shared.take<float>(slice)), rows(shared.take<T>(int64_t(kept) * slice)) {}
};

// The columns of this block.
template <class T>
struct Slice {
  static constexpr int SIZE = Pack<T>::SIZE;
  const Problem& p;
  int64_t row, first;
  int columns;

  // The row of the head that slot j names, or -1.
  __device__ int64_t live_id(int j) const {
    const int64_t id = integer_at(p.op.ids, row, j);
    return id < p.op.head.rows && !(real_at(p.op.log_probs, row, j) == -INFINITY) ? id : -1;
  }

  __device__ const T* at(int64_t id, int h) const {
    return static_cast<const T*>(p.op.head.data) + p.op.head.flat_offset(id) + (first + h) * p.op.head.column_stride;
  }

  // N columns from h on, a multiple of N, with 0 for those that there are not.
  template <class Few, int N>
  __device__ Few few_at(int64_t id, int h) const {
    if (p.on_packs && h + N <= columns) return *reinterpret_cast<const Few*>(at(id, h));
    Few few;
    for (int e = 0; e < N; ++e) few.at[e] = h + e < columns ? *at(id, h + e) : from_float<T>(0.0f);
    return few;
  }
};

// Starts the copies of the row of slot j by one warp, which is one group of copies even where there is none.
template <class T>
__device__ void fetch(const Slice<T>& slice, const HeadPieces<T>& pieces, int j) {
  constexpr int SIZE = Slice<T>::SIZE;
  const int64_t id = j < slice.p.kept ? slice.live_id(j) : -1;
  for (int h = int(threadIdx.x) % WARP * SIZE; id >= 0 && h < slice.columns; h += WARP * SIZE) {
    T* to = pieces.rows + int64_t(j) * slice.p.slice + h;
    if (h + SIZE <= slice.columns) __pipeline_memcpy_async(to, slice.at(id, h), 16);
    else *reinterpret_cast<Pack<T>*>(to) = slice.template few_at<Pack<T>, SIZE>(id, h);
  }
  __pipeline_commit();
}

// raw[j] of each live slot, one warp per slot; of a row that was fetched, a lane reads what it has copied itself.
template <class T>
__device__ void multiply(const Slice<T>& slice, const HeadPieces<T>& pieces) {
  constexpr int SIZE = Slice<T>::SIZE;
  const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
  for (int i = 0; i < AHEAD; ++i) fetch(slice, pieces, warp + i * WARPS);
  for (int j = warp; j < slice.p.k(); j += WARPS) {
    fetch(slice, pieces, j + AHEAD * WARPS);
    __pipeline_wait_prior(AHEAD);
    const int64_t id = slice.live_id(j);
    const T* kept = j < slice.p.kept ? pieces.rows + int64_t(j) * slice.p.slice : nullptr;
    float sum = 0;
    for (int h = lane * SIZE; id >= 0 && h < slice.columns; h += WARP * SIZE) {
      const Pack<T> pack = kept ? *reinterpret_cast<const Pack<T>*>(kept + h) : slice.template few_at<Pack<T>, SIZE>(id, h);
#pragma unroll
      for (int e = 0; e < SIZE; ++e) sum += to_float(pack.at[e]) * pieces.x[h + e];
    }
    for (int distance = WARP / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL, sum, distance);
    if (lane == 0) pieces.raw[j] = sum;
  }
}

// The sum over the slots of the gradient times the row of the head, for columns of this block, a few per thread.
template <class T>
__device__ void store_dhidden(const Slice<T>& slice, const HeadPieces<T>& pieces) {
  struct alignas(EACH * sizeof(T)) Few {
    T at[EACH];
  };
  const Problem& p = slice.p;
  for (int h = EACH * int(threadIdx.x); h < slice.columns; h += EACH * THREADS) {
    float total[EACH] = {};
    for (int start = 0; start < p.k(); start += TERMS) {
      const int end = start + TERMS < p.k() ? start + TERMS : p.k();
      float sum[EACH] = {};
      for (int j = start; j < end; ++j) {
        const float factor = pieces.factor[j];
        if (factor == 0) continue;  // its row of the head need not even be finite
        const Few few = j < p.kept
                            ? *reinterpret_cast<const Few*>(pieces.rows + int64_t(j) * p.slice + h)
                            : slice.template few_at<Few, EACH>(integer_at(p.op.ids, slice.row, j), h);
        for (int e = 0; e < EACH; ++e) sum[e] += factor * to_float(few.at[e]);
      }
      for (int e = 0; e < EACH; ++e) total[e] += sum[e];
    }
    for (int e = 0; e < EACH && h + e < slice.columns; ++e) {
      p.op.dhidden.data[slice.row * p.op.hidden.columns + slice.first + h + e] = total[e];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2) linear_loss_kernel(Problem p) {
  const int rank = cluster_rank(), blocks = cluster_size();
  const int64_t first = int64_t(rank) * p.slice, left = p.op.hidden.columns - first;
  const Slice<T> slice{p, blockIdx.x / blocks, first, int(left < 0 ? 0 : left < p.slice ? left : p.slice)};
  Shared shared = shared_memory();
  const HeadPieces<T> pieces(shared, p.k(), p.slice, p.kept);
  const double weight = weight_of(p.op.weights, slice.row);
  if (weight == 0) {
    if (rank == 0) store_zero_row(slice.row, p.k(), p.op.loss, p.op.g);
    for (int h = threadIdx.x; p.op.dhidden.data && h < slice.columns; h += THREADS) {
      p.op.dhidden.data[slice.row * p.op.hidden.columns + slice.first + h] = 0;
    }
    return;
  }

  const int64_t start = p.op.hidden.offset(slice.row) + first * p.op.hidden.column_stride;
  for (int h = threadIdx.x; h < p.slice; h += THREADS) {
    const bool inside = h < slice.columns;
    const int64_t at = start + h * p.op.hidden.column_stride;
    pieces.x[h] = inside ? float(real_at(p.op.hidden.data, p.op.hidden.kind, at)) : 0;
  }
  __syncthreads();
  multiply(slice, pieces);
  cluster_sync();

  double poison = 0;
  for (int j = threadIdx.x; j < p.k(); j += THREADS) {
    const int64_t id = slice.live_id(j);
    double raw = 0;
    for (int i = 0; i < blocks; ++i) raw += in_block(pieces.raw, i)[j];
    if (p.op.bias.data && id >= 0) raw += real_at(p.op.bias.data, p.op.bias.kind, id * p.op.bias.stride);
    const double z = p.op.objective.capped(raw, pieces.slope[j]);
    pieces.slots.z[j] = id < 0 ? -INFINITY : z;
    const double w = real_at(p.op.log_probs, slice.row, j);
    pieces.slots.w[j] = id < 0 ? -INFINITY : w;
    if (integer_at(p.op.ids, slice.row, j) >= 0) poison += poison_of(w);
  }
  const double loss = reverse_kl(pieces.slots, p.k(), 1 / p.op.objective.temperature, poison, [&](int j, double dz) {
    dz *= weight;
    pieces.factor[j] = float(dz == 0 ? 0 : dz * pieces.slope[j]);
    if (rank == 0) p.op.g.data[slice.row * p.k() + j] = pieces.factor[j];
  });
  if (rank == 0 && threadIdx.x == 0) p.op.loss[slice.row] = float(loss * weight);
  __syncthreads();
  if (p.op.dhidden.data) store_dhidden(slice, pieces);
  cluster_sync();  // the others may still read `raw`
}

template <class T>
void run(Problem p, const Where& where) {
  const int64_t n = p.op.ids.rows, width = p.op.hidden.columns, align = Pack<T>::SIZE;
  const int most = has_clusters(where.device) ? MAX_CLUSTER : 1;
  int cluster = 1;
  const auto plan = [&] {
    p.slice = int(((width + cluster - 1) / cluster + align - 1) / align * align);
    const int64_t room = ROOM - shared_bytes<HeadPieces<T>>(p.k(), p.slice, 0);
    p.kept = int(std::clamp<int64_t>(room / (p.slice * int64_t(sizeof(T))), 0, p.k()));
  };
  for (plan(); p.kept < p.k() && cluster < most && p.slice > LEAST_SLICE; plan()) cluster *= 2;
  // The order of the sums is settled; it must not depend on where the rows lie.
  const uintptr_t starts = reinterpret_cast<uintptr_t>(p.op.head.data) | p.op.head.row_stride * sizeof(T);
  p.on_packs = p.op.head.column_stride == 1 && starts % 16 == 0;
  if (!p.on_packs) p.kept = 0;
  launch("linear_loss_kernel of N = " + std::to_string(n) + ", K = " + std::to_string(p.k()) +
             ", H = " + std::to_string(width),
         linear_loss_kernel<T>,
         {n * cluster, 1, THREADS, shared_bytes<HeadPieces<T>>(p.k(), p.slice, p.kept), cluster}, where, p);
}

}  // namespace

void linear_loss(const LinearLoss& op, const Where& where) {
  with_kind(op.head.kind, [&](auto element) { run<decltype(element)>({op, 0, 0, false}, where); });
}

}  // namespace topk_rkl::cuda
