// Vectors of whatever width this file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace topk_rkl::TOPK_RKL_ISA {

#if defined(__AVX512BW__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class T, int SIZE = BYTES>
struct VecOf {
  typedef T type __attribute__((vector_size(SIZE)));
};
template <class T, int SIZE = BYTES>
using Vec = typename VecOf<T, SIZE>::type;

template <class V, class T>
inline V load_vec(const T* from) {
  V vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class V, class T>
inline void store_vec(T* to, V vector) {
  std::memcpy(to, &vector, sizeof vector);
}

template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

// One bit per lane of a mask whose lanes are 0 or -1.
template <class T>
inline uint32_t bits_of(Vec<T> mask) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2) return _mm512_movepi16_mask((__m512i)mask);
  return _mm512_cmplt_epi32_mask((__m512i)mask, _mm512_setzero_si512());
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 2) {
    const __m128i low = _mm256_castsi256_si128((__m256i)mask), high = _mm256_extracti128_si256((__m256i)mask, 1);
    return _mm_movemask_epi8(_mm_packs_epi16(low, high));
  }
  return _mm256_movemask_ps((__m256)mask);
#else
  Vec<uint64_t> halves = (Vec<uint64_t>)mask;
  if (!(halves[0] | halves[1])) return 0;
  uint32_t bits = 0;
  for (int i = 0; i < BYTES / int(sizeof(T)); ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}

constexpr int log2_of(int n) { return n < 2 ? 0 : 1 + log2_of(n / 2); }

// The i-th source lane of the lower (HIGH = 0) or upper half of a and b, interleaved in units of UNIT lanes inside
// each span of SPAN lanes; lanes of b count from LANES.
constexpr int interleaved(int i, int lanes, int span, int unit, int high) {
  const int in_span = i % span, pair = in_span / (2 * unit), which = in_span / unit % 2;
  return which * lanes + i / span * span + high * span / 2 + pair * unit + i % unit;
}

template <int SPAN, int UNIT, class V, int... I>
inline V merge_halves(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int LANES = sizeof...(I);
  return larger<V>(__builtin_shufflevector(a, b, interleaved(I, LANES, SPAN, UNIT, 0)...),
                   __builtin_shufflevector(a, b, interleaved(I, LANES, SPAN, UNIT, 1)...));
}

// One level of the tree by which LANES vectors become the one of their maxima: first inside units of 16 bytes, where a
// shuffle is cheapest, then of whole units.
template <class T, int LEVEL>
inline Vec<T> merge(Vec<T> a, Vec<T> b) {
  constexpr int LANES = BYTES / sizeof(T), UNIT = 16 / sizeof(T);
  constexpr auto lanes = std::make_integer_sequence<int, LANES>();
  if constexpr (LEVEL <= log2_of(UNIT)) return merge_halves<UNIT, 1, Vec<T>>(a, b, lanes);
  else return merge_halves<LANES, UNIT, Vec<T>>(a, b, lanes);
}

constexpr int reversed(int value, int bits) {
  return bits == 0 ? 0 : (value & 1) << (bits - 1) | reversed(value >> 1, bits - 1);
}

// Where the tree leaves the maximum of its i-th vector.
constexpr int merged_lane(int i, int lanes, int unit) {
  return reversed(i % unit, log2_of(unit)) + unit * reversed(i / unit, log2_of(lanes / unit));
}

template <class T, int... I>
inline Vec<T> in_order(Vec<T> merged, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(merged, merged, merged_lane(I, BYTES / sizeof(T), 16 / sizeof(T))...);
}

}  // namespace topk_rkl::TOPK_RKL_ISA
