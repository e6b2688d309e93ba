// Exact top-K of one row, for one instruction set.
//
// The row is read once for the maximum of every group of GROUP neighbouring columns. The K best groups, the earlier
// first among equals, must hold the K best columns: every column outside them is preceded, in the order (value
// descending, id ascending), by one column of each of those K groups. So K groups are read again.

#include "floats.hpp"
#include "isa.hpp"

extern "C" double log(double);

namespace topk_rkl::TOPK_RKL_ISA {
namespace {

// A key is an integer in the order of the elements: -inf is the lowest, -0.0 equals +0.0, and every NaN is the highest.
//
// `shifted` makes the integers from the bits, but leaves apart the two zeros and the NaN. `finished` makes one key of
// the zeros, and one of the NaN. It swaps no two keys, so it may be applied to a maximum alone.
template <class Int, class UInt, UInt INF>
struct Order {
  using Key = Int;
  static constexpr Int SIGNLESS = Int(UInt(~UInt(0)) >> 1), LOWEST = Int(~SIGNLESS), HIGHEST = SIGNLESS;
  static constexpr UInt MINUS_INF = UInt(LOWEST) | INF;
  static constexpr Int SHIFT = Int(UInt(LOWEST) - (MINUS_INF ^ UInt(SIGNLESS)));
  static constexpr Int TOP = Int(INF + UInt(SHIFT)), ZERO = SHIFT;

  static Vec<Int> shifted(Vec<Int> bits) {
    const Vec<Int> ordered = bits ^ ((bits >> (8 * sizeof(Int) - 1)) & SIGNLESS);
    return (Vec<Int>)((Vec<UInt>)ordered + UInt(SHIFT));
  }
  static Vec<Int> finished(Vec<Int> key) {
    key = key > TOP ? Vec<Int>{} + HIGHEST : key;
    return key == ZERO - 1 ? Vec<Int>{} + ZERO : key;
  }
};

struct BFloat16 : Order<int16_t, uint16_t, 0x7f80>, ReadBFloat16 {};
struct Float16 : Order<int16_t, uint16_t, 0x7c00>, ReadFloat16 {};
struct Float32 : Order<int32_t, uint32_t, 0x7f800000>, ReadFloat32 {};

template <class F>
struct Select {
  using Key = typename F::Key;
  using V = Vec<Key>;
  static constexpr int LANES = BYTES / sizeof(Key);
  static constexpr int64_t BLOCK = GROUP * LANES;

  static V read(const Key* from) { return F::shifted(load_vec<V>(from)); }

  static V group_max(const Key* from) {
    V top = read(from);
    for (int i = LANES; i < GROUP; i += LANES) top = larger(top, read(from + i));
    return top;
  }

  template <int LEVEL>
  static V tree(const V* tops) {
    if constexpr (LEVEL == 0) return *tops;
    else return merge<Key, LEVEL>(tree<LEVEL - 1>(tops), tree<LEVEL - 1>(tops + (1 << (LEVEL - 1))));
  }

  // The maxima of the LANES groups of a block. The loop is not unrolled: the processor fetches ahead by the stride of
  // each load instruction, and in an unrolled loop each of them has a stride too large for it.
  static V block_maxima(const Key* from) {
    V tops[LANES];
#pragma GCC unroll 1
    for (int i = 0; i < LANES; ++i) tops[i] = group_max(from + i * GROUP);
    return F::finished(in_order<Key>(tree<log2_of(LANES)>(tops), std::make_integer_sequence<int, LANES>()));
  }

  // How many of n keys, a multiple of LANES, are at least `floor`.
  static int64_t count(const Key* keys, int64_t n, Key floor) {
    constexpr int64_t PART = int64_t(LANES) << 14;  // what a 16-bit lane can count
    int64_t total = 0;
    for (int64_t start = 0; start < n; start += PART) {
      V lanes = {};
      const int64_t end = start + PART < n ? start + PART : n;
      for (int64_t i = start; i < end; i += LANES) lanes -= (V)(load_vec<V>(keys + i) >= floor);
      for (int i = 0; i < LANES; ++i) total += lanes[i];
    }
    return total;
  }

  // The k-th largest key, from the top bit down; LOWEST where fewer than k are above it.
  static Key kth_largest(const Key* keys, int64_t n, int64_t k) {
    Key kth = F::LOWEST;
    for (int bit = 8 * sizeof(Key) - 1; bit >= 0; --bit) {
      const Key trial = Key(uint64_t(kth) + (uint64_t(1) << bit));
      if (count(keys, n, trial) >= k) kth = trial;
    }
    return kth;
  }

  // Calls visit(i, key) for the k largest keys, the first among equals and never LOWEST, by ascending i.
  template <class Visit>
  static void visit_largest(const Key* keys, int64_t n, int64_t k, Visit visit) {
    const Key kth = kth_largest(keys, n, k);
    const Key floor = kth == F::LOWEST ? Key(kth + 1) : kth;
    int64_t left = k, tied = kth == F::HIGHEST ? k : k - count(keys, n, Key(kth + 1));
    for (int64_t i = 0; i < n; i += LANES) {
      for (uint32_t hits = bits_of<Key>(load_vec<V>(keys + i) >= floor); hits; hits &= hits - 1) {
        const int64_t at = i + __builtin_ctz(hits);
        if (keys[at] == kth && tied-- <= 0) continue;
        visit(at, keys[at]);
        if (--left == 0) return;
      }
    }
  }

  static void run(const Row& row, const Scratch& scratch) {
    const Key* data = static_cast<const Key*>(row.data);
    Key* maxima = static_cast<Key*>(scratch.maxima);
    Key* remainder = static_cast<Key*>(scratch.remainder);
    const int64_t whole = row.vocab / BLOCK * BLOCK;
    const int64_t groups = (row.vocab + BLOCK - 1) / BLOCK * LANES;
    for (int64_t start = 0; start < whole; start += BLOCK)
      store_vec(maxima + start / GROUP, block_maxima(data + start));
    if (whole < row.vocab) {
      for (int64_t i = row.vocab - whole; i < BLOCK; ++i) remainder[i] = Key(F::MINUS_INF);
      std::memcpy(remainder, data + whole, (row.vocab - whole) * sizeof(Key));
      store_vec(maxima + whole / GROUP, block_maxima(remainder));
    }
    const int64_t chosen = choose_groups(maxima, groups, row.k, scratch.groups);
    const int64_t found = choose_columns(data, remainder, whole, chosen, row.k, scratch);
    sort_by_key(scratch.items, scratch.spare, found, sizeof(Key));
    for (int64_t i = 0; i < found; ++i) row.ids[i] = int32_t(uint32_t(scratch.items[i]));
    for (int64_t i = 0; i < found; ++i) row.log_probs[i] = float(load(data + row.ids[i], kind()));
    for (int64_t i = found; i < row.k; ++i) row.ids[i] = -1, row.log_probs[i] = -__builtin_inff();
    if (row.normalize && found) {
      normalize(row, data, remainder, whole, found, Key(uint32_t(F::HIGHEST) - uint32_t(scratch.items[0] >> 32)));
    }
  }

  static constexpr Kind kind() {
    if constexpr (sizeof(Key) == 4) return Kind::float32;
    else return F::MINUS_INF == 0xff80 ? Kind::bfloat16 : Kind::float16;
  }

  static int64_t choose_groups(const Key* maxima, int64_t n, int64_t k, int32_t* chosen) {
    int64_t count = 0;
    visit_largest(maxima, n, k, [&](int64_t group, Key) { chosen[count++] = int32_t(group); });
    return count;
  }

  // The k best columns of the chosen groups, as items of which the sorted order is the answer.
  static int64_t choose_columns(const Key* data, const Key* remainder, int64_t whole, int64_t chosen, int64_t k,
                                const Scratch& scratch) {
    Key* keys = static_cast<Key*>(scratch.keys);
    const Key* maxima = static_cast<const Key*>(scratch.maxima);
    Key floor = F::HIGHEST;
    for (int64_t i = 0; i < chosen; ++i) {
      if (maxima[scratch.groups[i]] < floor) floor = maxima[scratch.groups[i]];
    }
    if (chosen < k) floor = F::LOWEST + 1;  // fewer maxima than k say nothing of the k-th column
    int64_t n = 0;
    for (int64_t i = 0; i < chosen; ++i) {
      const int64_t start = int64_t(scratch.groups[i]) * GROUP;
      const Key* from = start < whole ? data + start : remainder + (start - whole);
      for (int lane = 0; lane < GROUP; lane += LANES) {
        const V key = F::finished(read(from + lane));
        for (uint32_t hits = bits_of<Key>((V)(key >= floor)); hits; hits &= hits - 1) {
          const int at = __builtin_ctz(hits);
          scratch.columns[n] = int32_t(start + lane + at);
          keys[n++] = key[at];
        }
      }
    }
    for (int64_t i = n; i % LANES; ++i) keys[i] = F::LOWEST;
    int64_t found = 0;
    visit_largest(keys, (n + LANES - 1) / LANES * LANES, k, [&](int64_t i, Key key) {
      const uint32_t descending = uint32_t(F::HIGHEST) - uint32_t(key);
      scratch.items[found++] = uint64_t(descending) << 32 | uint32_t(scratch.columns[i]);
    });
    return found;
  }

  // Subtracts log(sum(exp(row))) from the log-probs; NaN where the largest of the row is NaN or +inf.
  static void normalize(const Row& row, const Key* data, const Key* remainder, int64_t whole, int64_t found, Key top) {
    double shift = __builtin_nan("");
    if (top < F::TOP) {
      const float peak = row.log_probs[0];
      double sum = sum_of_exponentials(data, whole, peak);
      sum += sum_of_exponentials(remainder, row.vocab > whole ? BLOCK : 0, peak);
      shift = peak + log(sum);
    }
    for (int64_t i = 0; i < found; ++i) row.log_probs[i] = float(row.log_probs[i] - shift);
  }

  // Of n columns, a multiple of BLOCK. The lanes are added in double after each block, so that no error builds up.
  static double sum_of_exponentials(const Key* data, int64_t n, float peak) {
    double sum = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
      Floats lanes = {};
      for (int64_t i = start; i < start + BLOCK; i += BYTES / 4) lanes += exp_of(F::floats(data + i) - peak);
      for (int i = 0; i < BYTES / 4; ++i) sum += lanes[i];
    }
    return sum;
  }
};

}  // namespace

extern const SelectRow SELECT_ROW[3] = {Select<BFloat16>::run, Select<Float16>::run, Select<Float32>::run};

}  // namespace topk_rkl::TOPK_RKL_ISA
