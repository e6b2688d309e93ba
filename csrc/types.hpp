// Tensors as raw pointers, with sizes and strides in elements.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TOPK_RKL_BOTH __host__ __device__
#else
#define TOPK_RKL_BOTH
#endif

namespace topk_rkl {

enum class Kind : int { bfloat16, float16, float32, float64, int32, int64 };

inline int64_t size_of(Kind kind) {
  return kind == Kind::bfloat16 || kind == Kind::float16 ? 2 : kind == Kind::float32 || kind == Kind::int32 ? 4 : 8;
}

// (rows, columns) of any strides, or nothing where data is null. Rows come in slabs of `slab_rows`, each `slab_stride`
// after the last: mostly in one.
struct Matrix {
  void* data;
  Kind kind;
  int64_t rows, columns, row_stride, column_stride;
  int64_t slab_rows = INT64_MAX, slab_stride = 0;

  // Where a row starts, in elements. The rows of the first slab, often all there are, need no division.
  TOPK_RKL_BOTH int64_t offset(int64_t row) const {
    if (row < slab_rows) return flat_offset(row);
#if defined(__CUDA_ARCH__)  // which has a grid of fewer than 2^31 rows, and no instruction to divide 64 bits
    const int64_t slab = uint32_t(row) / uint32_t(slab_rows);
#else
    const int64_t slab = row / slab_rows;
#endif
    return slab * slab_stride + (row - slab * slab_rows) * row_stride;
  }
  // The same for a single slab, as K numbers per row and the head are: it costs a GPU no registers for a division.
  TOPK_RKL_BOTH int64_t flat_offset(int64_t row) const { return row * row_stride; }

  char* at(int64_t row, int64_t column = 0) const {
    return static_cast<char*>(data) + (offset(row) + column * column_stride) * size_of(kind);
  }
  int64_t column_bytes() const { return column_stride * size_of(kind); }  // from column to column
};

// An output of contiguous rows, or nothing where data is null.
template <class T>
struct Rows {
  T* data;
  int64_t columns;

  TOPK_RKL_BOTH T* operator[](int64_t row) const { return data + row * columns; }
};

// One element as a double, exactly, of the kinds that are floating point; and of those that are integers.
double load(const void* element, Kind kind);
int64_t load_integer(const void* element, Kind kind);

// A vector, or nothing where data is null.
struct Vector {
  void* data;
  Kind kind;
  int64_t size, stride;

  char* at(int64_t i) const { return static_cast<char*>(data) + i * stride * size_of(kind); }
  double operator[](int64_t i) const { return load(at(i), kind); }
  double value_or_1(int64_t i) const { return data ? (*this)[i] : 1; }
};

// A row in one piece: itself, or a copy where its columns are apart.
const void* contiguous(const Matrix& x, int64_t row, char* copy);

// The n first elements of a row, and those at n columns of it.
void load_floats(const Matrix& x, int64_t row, int64_t n, double* to);
void load_integers(const Matrix& x, int64_t row, int64_t n, int64_t* to);
void gather(const Matrix& x, int64_t row, const int64_t* columns, int64_t n, double* to);

// To nearest, ties to even; not of float64.
void store(char* to, Kind kind, float value);

// Rounded once; and +0 where it is 0 or a factor is, even if the other is not finite.
inline float product(double g, double scale) {
  const auto value = float(g * scale);
  return g == 0 || scale == 0 || value == 0 ? 0.0f : value;
}

// (key << 32 | payload), ascending by `bytes` bytes of the key; equal keys keep their order.
void sort_by_key(uint64_t* items, uint64_t* spare, int64_t n, int bytes);

}  // namespace topk_rkl
