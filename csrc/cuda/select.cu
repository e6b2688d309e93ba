// Exact row-wise top-K in one read of the row, and the loss on those K slots in the same launch.
//
// Each thread of a block reads 16 bytes of the row at a time. One instruction compares two 16-bit elements with the
// least value that can still be of the K best; what passes is a candidate (candidates.cuh). The order of the parts of a
// row has nothing to do with the order of ids, so that a row of rising values does not make all of them candidates.
// Few rows are split over several blocks, and a second launch merges the K best of each.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "candidates.cuh"
#include "launch.hpp"
#include "slots.cuh"

namespace topk_rkl::cuda {
namespace {

constexpr int THREADS = Candidates::THREADS;
constexpr int PACKS = 4;  // that a thread has in flight
constexpr int MAX_PARTS = 32;
constexpr double GOLDEN = 0.618;

// A selection, and the loss on what is selected.
struct Selection {
  Select to;        // without log-probs where there is a loss
  SelectLoss loss;  // or none, where its `loss` is null
  Item* best;       // (N, parts, K) scratch, where rows are split

  TOPK_RKL_BOTH int k() const { return int(to.ids.columns); }
};

// 16 bytes of a row, kept as words: as elements they would be taken apart and put together again.
struct alignas(16) Words {
  uint32_t at[4];

  template <class T>
  __device__ T element(int e) const {
    constexpr int EACH = 4 / int(sizeof(T));
    const uint32_t bits = at[e / EACH] >> (e % EACH * 16);
    T result;
    memcpy(&result, &bits, sizeof(T));
    return result;
  }
};

template <class T>
constexpr uint32_t MINUS_INF = 0xff800000;
template <>
constexpr uint32_t MINUS_INF<BFloat16> = 0xff80ff80;
template <>
constexpr uint32_t MINUS_INF<Float16> = 0xfc00fc00;

// A row as packs of 16 bytes that begin on an address of their own size; the first and the last may be cut off.
template <class T>
struct Row {
  static constexpr int SIZE = Pack<T>::SIZE;
  const T* data;
  int64_t columns, column_stride;
  int lead, first_whole, whole;  // elements of the first pack before the row; the packs that are not cut off

  __device__ Row(const Matrix& logits, int64_t row)
      : data(static_cast<const T*>(logits.data) + logits.offset(row)), columns(logits.columns),
        column_stride(logits.column_stride),
        lead(column_stride == 1 ? int(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T)) : 0), first_whole(lead > 0),
        whole(int((columns + lead) / SIZE) - first_whole) {}

  __device__ float at(int64_t column) const { return to_float(data[column * column_stride]); }
  __device__ int64_t packs() const { return (columns + lead + SIZE - 1) / SIZE; }
  __device__ int64_t first_column(int pack) const { return int64_t(pack) * SIZE - lead; }

  // All of a tile, which is whole.
  __device__ bool is_whole(int first_pack, int packs) const {
    return first_pack >= first_whole && first_pack + packs <= first_whole + whole;
  }
  __device__ Words whole_pack(int i) const {
    const uint4 read = __ldcs(reinterpret_cast<const uint4*>(data - lead) + i);
    return {read.x, read.y, read.z, read.w};
  }

  // -inf where there is nothing, and with PACKED where it is cut off.
  template <bool PACKED>
  __device__ Words pack(int i) const {
    if (!PACKED) return gathered(i);
    return is_whole(i, 1) ? whole_pack(i) : filled();
  }

  // -inf where there is nothing or it is whole.
  __device__ Words end(int i) const { return is_whole(i, 1) ? filled() : gathered(i); }

  __device__ Words gathered(int i) const {
    Words words = filled();
#pragma unroll
    for (int e = 0; e < SIZE; ++e) {
      const int64_t column = first_column(i) + e;
      if (i < 0 || column < 0 || column >= columns) continue;
      const T element = data[column * column_stride];
      uint32_t bits = 0;
      memcpy(&bits, &element, sizeof(T));
      constexpr int EACH = 4 / int(sizeof(T));
      const uint32_t mask = EACH == 1 ? 0xffffffff : 0xffffu << (e % EACH * 16);
      words.at[e / EACH] = (words.at[e / EACH] & ~mask) | bits << (e % EACH * 16);
    }
    return words;
  }

  __device__ static Words filled() { return {MINUS_INF<T>, MINUS_INF<T>, MINUS_INF<T>, MINUS_INF<T>}; }
};

template <class T>
constexpr float LOWEST = -3.402823466e38f;
template <>
constexpr float LOWEST<BFloat16> = -3.389531390e38f;
template <>
constexpr float LOWEST<Float16> = -65504.0f;

// The least finite value that an element needs. Rounding it to T leaves out no T that is as large.
template <class T>
__device__ T floor_of(Item floor) {
  const float x = float_of(uint32_t(floor >> 32));
  return from_float<T>(x != x ? INFINITY : x < LOWEST<T> ? LOWEST<T> : x);
}

// A bit for each element that is at or above the floor, or NaN. 16-bit elements are compared two at a time, and the two
// answers of word i stand in bits i and 16 + i.
template <class Two, class T>
__device__ uint32_t passing_twos(const Words (&x)[PACKS], T floor) {
  const Two floors{floor, floor};
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < 4 * PACKS; ++i) {
    Two two;
    memcpy(&two, &x[i / 4].at[i % 4], 4);
    mask |= __hgeu2_mask(two, floors) & (0x10001u << i);
  }
  return mask;
}
__device__ inline uint32_t passing(const Words (&x)[PACKS], BFloat16 floor) {
  return passing_twos<__nv_bfloat162>(x, floor);
}
__device__ inline uint32_t passing(const Words (&x)[PACKS], Float16 floor) {
  return passing_twos<__half2>(x, floor);
}
__device__ inline uint32_t passing(const Words (&x)[PACKS], float floor) {
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < 4 * PACKS; ++i) mask |= uint32_t(!(__uint_as_float(x[i / 4].at[i % 4]) < floor)) << i;
  return mask;
}

template <class T>
__device__ int element_of(int bit) {
  return sizeof(T) == 2 ? bit % 16 * 2 + bit / 16 : bit;
}

// Raises the floor to what the first tile tells: of each part of what a thread has, the largest is a sample. In place of
// a NaN any other will do, as it is lower.
template <class T>
__device__ void raise_floor(Candidates& best, const Words (&x)[PACKS]) {
  constexpr int EACH = 4 / int(sizeof(T));
  static_assert(4 * PACKS == Candidates::SAMPLE);
  float top[4 * PACKS];
#pragma unroll
  for (int i = 0; i < 4 * PACKS; ++i) {
    const Words& words = x[i / 4];
    top[i] = to_float(words.template element<T>(i % 4 * EACH));
    if (EACH == 2) top[i] = fmaxf(top[i], to_float(words.template element<T>(i % 4 * EACH + EACH - 1)));
  }
  const auto largest = [&](int i) { return fmaxf(fmaxf(top[i], top[i + 1]), fmaxf(top[i + 2], top[i + 3])); };
  if (best.sample_size() <= PACKS) {
#pragma unroll
    for (int v = 0; v < PACKS; ++v) top[v] = largest(4 * v);
  }
  if (best.sample_size() == 1) top[0] = largest(0);
  best.raise_floor(top);
}

// The running sum of exponentials of what a thread has seen, less the largest.
struct Mass {
  float peak = -INFINITY, sum = 0;

  template <class T>
  __device__ void add(const Words (&x)[PACKS]) {
    constexpr int SIZE = Pack<T>::SIZE;
    float top = peak;
#pragma unroll
    for (int e = 0; e < PACKS * SIZE; ++e) top = fmaxf(top, to_float(x[e / SIZE].template element<T>(e % SIZE)));
    const float base = top == -INFINITY ? 0 : top;
    sum *= short_exp(peak - base);
    float added = 0;  // before they join the sum of the others, so that a long sum does not lose bits
#pragma unroll
    for (int e = 0; e < PACKS * SIZE; ++e) added += short_exp(to_float(x[e / SIZE].template element<T>(e % SIZE)) - base);
    sum += added;
    peak = top;
  }

  __device__ double log_total(double* of_warp) const {
    const double top = over_block(peak, of_warp, [](double a, double b) { return fmax(a, b); });
    return top + log(sum_over_block(sum * exp(peak - top), of_warp));
  }
};

// A row is read in tiles of TILE packs, each `stride` after the last.
constexpr int TILE = PACKS * THREADS;
struct Order {
  int tiles, stride;
};

template <class T, bool PACKED>
struct Tile {
  Words packs[PACKS];
  int first;  // index of the first pack of this thread; the next is THREADS further on

  __device__ void load(const Row<T>& row, int tile) {
    first = tile * TILE + int(threadIdx.x);
    if (PACKED && row.is_whole(tile * TILE, TILE)) {
#pragma unroll
      for (int v = 0; v < PACKS; ++v) packs[v] = row.whole_pack(first + v * THREADS);
    } else {
#pragma unroll
      for (int v = 0; v < PACKS; ++v) packs[v] = row.template pack<PACKED>(first + v * THREADS);
    }
  }

  // The packs that are cut off by an end of the row.
  __device__ void load_ends(const Row<T>& row) {
    int end = threadIdx.x == 0 ? 0 : threadIdx.x == 1 ? int(row.packs() - 1) : -1;
    if (threadIdx.x == 1 && end == 0) end = -1;
    first = end;
    for (int v = 0; v < PACKS; ++v) packs[v] = row.end(v == 0 ? end : -1);
  }
};

struct SelectPieces {
  Candidates best;
  Slots slots;

  __host__ __device__ SelectPieces(Shared& shared, int k) : best(shared, k), slots(shared, k) {}
};

// Writes the K best in order, and the loss on them.
template <class T>
__device__ void store_row(const Selection& s, int64_t row_index, const Row<T>& row, const SelectPieces& pieces,
                          double weight, double shift) {
  const auto slot_of = [&](int j, int64_t& id, double& w) {
    const Item item = pieces.best.items[j];
    id = item ? id_of(item) : -1;
    w = item ? row.at(id) - shift : -INFINITY;
  };
  for (int j = threadIdx.x; j < s.k(); j += THREADS) {
    int64_t id;
    double w;
    slot_of(j, id, w);
    s.to.ids.data[row_index * s.k() + j] = int32_t(id);
    if (s.to.log_probs.data) s.to.log_probs.data[row_index * s.k() + j] = float(w);
  }
  if (!s.loss.loss) return;
  store_loss_row(s.loss.student, row_index, pieces.slots, s.k(), weight, s.loss.objective.temperature, s.loss.loss,
                 s.loss.g, slot_of);
}

// A row of weight 0 is not read.
__device__ inline bool is_left_out(const Selection& s, int64_t row, double weight, bool last) {
  if (!s.loss.loss || weight != 0) return false;
  if (!last) return true;
  for (int j = threadIdx.x; j < s.k(); j += THREADS) s.to.ids.data[row * s.k() + j] = -1;
  store_zero_row(row, s.k(), s.loss.loss, s.loss.g);
  return true;
}

// One block sorts and compares while the others of its processor read: 64 registers leave room for four. The sums of
// exponentials, and packs gathered from columns that are apart, take more.
template <class T, bool PACKED, bool NORMALIZE>
__global__ void __launch_bounds__(THREADS, PACKED && !NORMALIZE ? 4 : 2)
    select_kernel(Selection s, int parts, Order order) {
  const int64_t row_index = blockIdx.x / parts;
  const int part = int(blockIdx.x % parts);
  Shared shared = shared_memory();
  SelectPieces pieces(shared, s.k());
  Candidates& best = pieces.best;
  if (is_left_out(s, row_index, weight_of(s.loss.weights, row_index), parts == 1)) return;

  const Row<T> row(s.to.logits, row_index);
  best.clear();
  Mass mass;
  const auto visit = [&](const Tile<T, PACKED>& tile) {
    if (NORMALIZE) mass.add<T>(tile.packs);
    best.offer(passing(tile.packs, floor_of<T>(best.floor())), [&](int bit) {
      const int element = element_of<T>(bit), v = element / Row<T>::SIZE;
      const int64_t column = row.first_column(tile.first + v * THREADS) + element % Row<T>::SIZE;
      return item_of(row.at(column), column);
    });
  };
  const int start = int(int64_t(order.tiles) * part / parts), end = int(int64_t(order.tiles) * (part + 1) / parts);
  int at = int(int64_t(start) * order.stride % order.tiles);
  Tile<T, PACKED> tile, next;
  next.load(row, at);
  raise_floor<T>(best, next.packs);
  for (int done = start; done < end; ++done) {
    tile = next;
    at += order.stride;
    if (at >= order.tiles) at -= order.tiles;
    if (done + 1 < end) next.load(row, at);  // in flight while the others are compared
    visit(tile);
  }
  if (PACKED && part == 0) {
    tile.load_ends(row);
    visit(tile);
  }

  best.finish();
  if (parts > 1) {
    Item* to = s.best + int64_t(blockIdx.x) * s.k();
    for (int j = threadIdx.x; j < s.k(); j += THREADS) to[j] = best.items[j];
    return;
  }
  const double weight = weight_of(s.loss.weights, row_index);  // read again, and not kept in registers all along
  store_row(s, row_index, row, pieces, weight, NORMALIZE ? mass.log_total(pieces.slots.of_warp) : 0.0);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 4) merge_kernel(Selection s, int parts) {
  const int64_t row_index = blockIdx.x;
  Shared shared = shared_memory();
  SelectPieces pieces(shared, s.k());
  const double weight = weight_of(s.loss.weights, row_index);
  if (is_left_out(s, row_index, weight, true)) return;

  pieces.best.clear();
  __syncthreads();
  const Item* from = s.best + row_index * parts * s.k();
  for (int start = 0; start < parts * s.k(); start += THREADS) {
    const int i = start + int(threadIdx.x);
    const Item item = i < parts * s.k() ? from[i] : 0;
    pieces.best.offer(item != 0, [&](int) { return item; });
  }
  pieces.best.finish();
  store_row(s, row_index, Row<T>(s.to.logits, row_index), pieces, weight, 0.0);
}

// As many tiles as read a row of any address. A stride near the golden ratio spreads the first ones over the row.
Order order_of(int64_t vocab, Kind kind) {
  const int64_t size = 16 / size_of(kind), packs = (vocab + size - 1) / size + 1;
  const int tiles = int((packs + TILE - 1) / TILE);
  int stride = std::max(1, int(GOLDEN * tiles));
  while (std::gcd(stride, tiles) != 1) ++stride;
  return {tiles, stride % tiles};
}

// Blocks per row: one, unless that leaves processors idle. Sums of exponentials would depend on it.
int parts_of(int64_t n, const Order& order, bool normalize, int device) {
  if (normalize || n == 0) return 1;
  return int(std::clamp<int64_t>(std::min<int64_t>(2 * processors(device) / n, order.tiles), 1, MAX_PARTS));
}

void run(const Selection& s, const Where& where) {
  const Matrix& logits = s.to.logits;
  const bool normalize = s.to.normalize;
  const int64_t n = logits.rows;
  const Order order = order_of(logits.columns, logits.kind);
  const int parts = parts_of(n, order, normalize, where.device);
  const int64_t bytes = shared_bytes<SelectPieces>(s.k());
  const std::string shape = " of N = " + std::to_string(n) + ", V = " + std::to_string(logits.columns) +
                            ", K = " + std::to_string(s.k());
  with_kind(logits.kind, [&](auto element) {
    using T = decltype(element);
    const bool packed = logits.column_stride == 1;
    const auto kernel = packed      ? normalize ? select_kernel<T, true, true> : select_kernel<T, true, false>
                        : normalize ? select_kernel<T, false, true>
                                    : select_kernel<T, false, false>;
    launch("select_kernel" + shape, kernel, {n * parts, 1, THREADS, bytes}, where, s, parts, order);
    if (parts > 1) launch("merge_kernel" + shape, merge_kernel<T>, {n, 1, THREADS, bytes}, where, s, parts);
  });
}

// Selects what the loss is taken of.
Select selection_of(const SelectLoss& op) { return {op.teacher, false, op.ids, {}}; }

}  // namespace

int64_t select_scratch(const Select& op, int device) {
  const Matrix& logits = op.logits;
  const int parts = parts_of(logits.rows, order_of(logits.columns, logits.kind), op.normalize, device);
  return parts == 1 ? 0 : logits.rows * parts * op.ids.columns * int64_t(sizeof(Item));
}

int64_t select_loss_scratch(const SelectLoss& op, int device) { return select_scratch(selection_of(op), device); }

void select(const Select& op, const Where& where) { run({op, {}, static_cast<Item*>(where.scratch)}, where); }

void select_loss(const SelectLoss& op, const Where& where) {
  run({selection_of(op), op, static_cast<Item*>(where.scratch)}, where);
}

}  // namespace topk_rkl::cuda
