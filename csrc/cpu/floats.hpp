// Vectors of float32, read from memory of each kind.
#pragma once

#include "simd.hpp"

namespace topk_rkl::TOPK_RKL_ISA {

using Wide = Vec<int32_t>;
using Floats = Vec<float>;
using Narrow = Vec<int16_t, BYTES / 2>;

inline Wide widened(const void* from) {
  return __builtin_convertvector(load_vec<Narrow>(static_cast<const int16_t*>(from)), Wide) & 0xffff;
}

struct ReadBFloat16 {
  static constexpr int SIZE = 2;
  static Floats floats(const void* from) { return (Floats)(widened(from) << 16); }
};

struct ReadFloat16 {
  static constexpr int SIZE = 2;
  static Floats floats(const void* from) {
    const Wide bits = widened(from);
    const Floats size = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
    const Wide not_finite = (bits & 0x7c00) == 0x7c00;
    return (Floats)((Wide)size | (not_finite & 0x7f800000) | (bits & 0x8000) << 16);
  }
};

struct ReadFloat32 {
  static constexpr int SIZE = 4;
  static Floats floats(const void* from) { return load_vec<Floats>(static_cast<const float*>(from)); }
};

}  // namespace topk_rkl::TOPK_RKL_ISA
