// Exponentials of a whole row, block by block, for one instruction set.
#include "floats.hpp"
#include "isa.hpp"

namespace topk_rkl::TOPK_RKL_ISA {
namespace {

constexpr int LANES = BYTES / 4;

template <class Read>
void read(const void* row, int64_t n, float* to) {
  const char* from = static_cast<const char*>(row);
  const int64_t whole = n / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) store_vec(to + i, Read::floats(from + i * Read::SIZE));
  if (whole == n) return;
  alignas(64) char last[LANES * Read::SIZE] = {};
  std::memcpy(last, from + whole * Read::SIZE, (n - whole) * Read::SIZE);
  store_vec(to + whole, Read::floats(last));
  for (int64_t i = n; i < whole + LANES; ++i) to[i] = -__builtin_inff();
}

float peak(const float* x, int64_t n) {
  Floats tops = Floats{} - __builtin_inff();
  Wide bad = {};
  for (int64_t i = 0; i < n; i += LANES) {
    const Floats y = load_vec<Floats>(x + i);
    bad |= ~(Wide)(y < __builtin_inff());
    tops = larger(tops, y);
  }
  float top = -__builtin_inff();
  int32_t any = 0;
  for (int i = 0; i < LANES; ++i) top = tops[i] > top ? tops[i] : top, any |= bad[i];
  return any ? __builtin_nanf("") : top;
}

// Lanes are added in double at the end of the block, so that no error builds up.
double sum(const float* x, int64_t n, float peak, float inv_t) {
  Floats lanes = {};
  for (int64_t i = 0; i < n; i += LANES) lanes += exp_of((load_vec<Floats>(x + i) - peak) * inv_t);
  double total = 0;
  for (int i = 0; i < LANES; ++i) total += lanes[i];
  return total;
}

void scale(float* x, int64_t n, float peak, float inv_t, float factor) {
  for (int64_t i = 0; i < n; i += LANES) {
    const Floats power = (load_vec<Floats>(x + i) - peak) * inv_t;
    store_vec(x + i, exp_of(power > 0.0f ? Floats{} : power) * factor);
  }
}

}  // namespace

extern const RowBlocks ROW_BLOCKS = {{read<ReadBFloat16>, read<ReadFloat16>, read<ReadFloat32>}, peak, sum, scale};

}  // namespace topk_rkl::TOPK_RKL_ISA
