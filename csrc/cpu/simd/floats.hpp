// Vectors of float32, read from memory of each kind, and their exponentials.
#pragma once

#include "vectors.hpp"

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
    // The exponents of float32 are larger by 112, subnormals included.
    const Floats size = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
    const Wide not_finite = (bits & 0x7c00) == 0x7c00;
    return (Floats)((Wide)size | (not_finite & 0x7f800000) | (bits & 0x8000) << 16);
  }
};

struct ReadFloat32 {
  static constexpr int SIZE = 4;
  static Floats floats(const void* from) { return load_vec<Floats>(static_cast<const float*>(from)); }
};

// exp(x) of x <= 0 in float32: 2^n times a polynomial, with the coefficients of expf in Cephes, as log(2) in two parts.
// 0 below -87, where float32 soon ends.
inline Floats exp_of(Floats x) {
  const Floats bounded = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats rounder = Floats{} + 0x1.8p23f;
  const Floats whole = bounded * 1.44269504f + rounder;
  const Wide exponent = ((Wide)whole - (Wide)rounder) << 23;
  const Floats n = whole - rounder;
  const Floats r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return x < -87.0f ? Floats{} : (Floats)((Wide)p + exponent);
}

}  // namespace topk_rkl::TOPK_RKL_ISA
