// Sums of rows of the head, or of hidden states, by one thread.
#pragma once

#include <algorithm>
#include <vector>

#include "simd/isa.hpp"

namespace topk_rkl {

// A row of float32, as long as the functions of HeadRows write.
inline std::vector<float> padded_row(int64_t width) {
  return std::vector<float>((width + HEAD_BLOCK - 1) / HEAD_BLOCK * HEAD_BLOCK);
}

// The sum of factors[j] rows[j], each of `out.size()` elements at most.
inline void sum_rows(const Isa& isa, Kind kind, const void* const* rows, const float* factors, int64_t count,
                     int64_t width, std::vector<float>& out) {
  constexpr int64_t TERMS = 256;  // added up before they join the sum of the others: a long sum would lose bits
  std::fill(out.begin(), out.end(), 0.0f);
  for (int64_t i = 0; i < count; i += TERMS) {
    isa.head.add_rows[int(kind)](rows + i, factors + i, std::min(TERMS, count - i), width, out.data());
  }
}

}  // namespace topk_rkl
