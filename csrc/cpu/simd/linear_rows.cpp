// Products with rows of the head, for one instruction set. Sums are kept in float32, 64 or more at a time.
#include "floats.hpp"
#include "isa.hpp"

namespace topk_rkl::TOPK_RKL_ISA {
namespace {

constexpr int LANES = BYTES / 4, VECTORS = 4, BLOCK = VECTORS * LANES;

// The columns of a row after its whole blocks, filled up with zeros.
template <class Read>
struct Remainder {
  alignas(64) char bytes[BLOCK * Read::SIZE] = {};
  Remainder(const char* row, int64_t from, int64_t n) {
    std::memcpy(bytes, row + from * Read::SIZE, (n - from) * Read::SIZE);
  }
};

template <class Read>
double dot(const void* row, const float* x, int64_t n) {
  const char* from = static_cast<const char*>(row);
  Floats sums[VECTORS] = {};
  const auto add = [&](const char* at, const float* y) {
    for (int v = 0; v < VECTORS; ++v)
      sums[v] += Read::floats(at + v * LANES * Read::SIZE) * load_vec<Floats>(y + v * LANES);
  };
  const int64_t whole = n / BLOCK * BLOCK;
  for (int64_t i = 0; i < whole; i += BLOCK) add(from + i * Read::SIZE, x + i);
  if (whole < n) add(Remainder<Read>(from, whole, n).bytes, x + whole);
  const Floats lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0;
  for (int i = 0; i < LANES; ++i) sum += lanes[i];
  return sum;
}

template <class Read>
void add_rows(const void* const* rows, const float* factors, int64_t count, int64_t n, float* out) {
  const auto add = [&](int64_t i, auto block_of) {
    Floats sums[VECTORS] = {};
    for (int64_t j = 0; j < count; ++j) {
      const auto block = block_of(static_cast<const char*>(rows[j]));
      for (int v = 0; v < VECTORS; ++v) sums[v] += Read::floats(&block[v * LANES * Read::SIZE]) * factors[j];
    }
    for (int v = 0; v < VECTORS; ++v) store_vec(out + i + v * LANES, load_vec<Floats>(out + i + v * LANES) + sums[v]);
  };
  const int64_t whole = n / BLOCK * BLOCK;
  for (int64_t i = 0; i < whole; i += BLOCK) add(i, [&](const char* row) { return row + i * Read::SIZE; });
  struct Last : Remainder<Read> {
    using Remainder<Read>::Remainder;
    const char& operator[](int64_t i) const { return this->bytes[i]; }
  };
  if (whole < n) add(whole, [&](const char* row) { return Last(row, whole, n); });
}

// To nearest, ties to even.
void round_bfloat16(const float* from, char* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
    const auto rounded = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? nan : nearest);
    std::memcpy(to + 2 * i, &rounded, 2);
  }
}

}  // namespace

extern const HeadRows HEAD_ROWS = {
    {dot<ReadBFloat16>, dot<ReadFloat16>, dot<ReadFloat32>},
    {add_rows<ReadBFloat16>, add_rows<ReadFloat16>, add_rows<ReadFloat32>},
    round_bfloat16,
};

}  // namespace topk_rkl::TOPK_RKL_ISA
