#include "types.hpp"

#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

namespace topk_rkl {
namespace {

template <class T>
T read(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

double half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                               : std::ldexp(fraction, -24);
  return bits >> 15 ? -size : size;
}

// Calls f with what reads one element of the kind, so that a loop in f asks for the kind once.
template <class F>
double with_reader(Kind kind, F f) {
  switch (kind) {
    case Kind::bfloat16:
      return f([](const void* from) -> double { return std::bit_cast<float>(uint32_t(read<uint16_t>(from)) << 16); });
    case Kind::float16: return f([](const void* from) { return half(read<uint16_t>(from)); });
    case Kind::float32: return f([](const void* from) -> double { return read<float>(from); });
    case Kind::float64: return f(read<double>);
    default: return 0;
  }
}

uint16_t bfloat16_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t float16_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
  constexpr uint32_t LEAST_NORMAL = 0x38800000, REBIAS = 0x38000000;  // 2^-14; exponents of float32 are larger by 112
  // A subnormal of float16 is a multiple of 2^-24, which is the spacing of float32 from 0.5 on.
  if (size < LEAST_NORMAL) {
    return uint16_t(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | ((size - REBIAS + 0xfff + (size >> 13 & 1)) >> 13));
}

}  // namespace

const void* contiguous(const Matrix& x, int64_t row, char* copy) {
  const char* from = x.at(row);
  if (x.column_stride == 1) return from;
  const int64_t size = size_of(x.kind);
  for (int64_t i = 0; i < x.columns; ++i) std::memcpy(copy + i * size, from + i * x.column_bytes(), size);
  return copy;
}

double load(const void* element, Kind kind) {
  return with_reader(kind, [&](auto read_one) { return read_one(element); });
}

void load_floats(const Matrix& x, int64_t row, int64_t n, double* to) {
  const char* from = x.at(row);
  const int64_t step = x.column_bytes();
  with_reader(x.kind, [&](auto read_one) {
    for (int64_t i = 0; i < n; ++i) to[i] = read_one(from + i * step);
    return 0.0;
  });
}

void gather(const Matrix& x, int64_t row, const int64_t* columns, int64_t n, double* to) {
  const char* from = x.at(row);
  const int64_t step = x.column_bytes();
  with_reader(x.kind, [&](auto read_one) {
    for (int64_t i = 0; i < n; ++i) to[i] = read_one(from + columns[i] * step);
    return 0.0;
  });
}

void load_integers(const Matrix& x, int64_t row, int64_t n, int64_t* to) {
  const char* from = x.at(row);
  const int64_t step = x.column_bytes();
  if (x.kind == Kind::int64) {
    for (int64_t i = 0; i < n; ++i) to[i] = read<int64_t>(from + i * step);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = read<int32_t>(from + i * step);
  }
}

void store(char* to, Kind kind, float value) {
  if (kind == Kind::float32) {
    std::memcpy(to, &value, 4);
  } else {
    const uint16_t bits = kind == Kind::bfloat16 ? bfloat16_bits(value) : float16_bits(value);
    std::memcpy(to, &bits, 2);
  }
}

int64_t load_integer(const void* element, Kind kind) {
  return kind == Kind::int64 ? read<int64_t>(element) : read<int32_t>(element);
}

void sort_by_key(uint64_t* items, uint64_t* spare, int64_t n, int bytes) {
  uint64_t* from = items;
  uint64_t* to = spare;
  for (int shift = 32; shift < 32 + 8 * bytes; shift += 8) {
    int64_t place[256] = {};
    for (int64_t i = 0; i < n; ++i) ++place[from[i] >> shift & 255];
    int64_t below = 0;
    for (int64_t& count : place) below += std::exchange(count, below);
    for (int64_t i = 0; i < n; ++i) to[place[from[i] >> shift & 255]++] = from[i];
    std::swap(from, to);
  }
  if (from != items && n > 0) std::memcpy(items, from, n * sizeof *items);
}

}  // namespace topk_rkl
