// What the kernels are written in: CUDA, or its stand-in on the host (testing/simt.hpp).
#pragma once

#include <cstdint>

#include "../types.hpp"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#else
#include "../testing/simt.hpp"
#endif

namespace topk_rkl::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffff;  // lanes

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

// An element as a float, exactly; and back, to nearest, ties to even.
__device__ inline float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(Float16 x) { return __half2float(x); }
__device__ inline float to_float(float x) { return x; }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline Float16 from_float<Float16>(float x) { return __float2half_rn(x); }
template <>
__device__ inline float from_float<float>(float x) { return x; }

// To 2 ulp near 0, where it counts, and 1.2 |x| ulp more below: of x <= 0, for sums of them.
__device__ inline float short_exp(float x) {
#if defined(__CUDACC__)
  return __expf(x);
#else
  return expf(x);
#endif
}

// Of a kind that only the caller knows, as K numbers per row may be.
__device__ inline double real_at(const void* data, Kind kind, int64_t at) {
  switch (kind) {
    case Kind::bfloat16: return to_float(static_cast<const BFloat16*>(data)[at]);
    case Kind::float16: return to_float(static_cast<const Float16*>(data)[at]);
    case Kind::float32: return static_cast<const float*>(data)[at];
    default: return static_cast<const double*>(data)[at];
  }
}

// Of K numbers per row.
__device__ inline double real_at(const Matrix& x, int64_t row, int64_t column) {
  return real_at(x.data, x.kind, x.flat_offset(row) + column * x.column_stride);
}

__device__ inline int64_t integer_at(const Matrix& x, int64_t row, int64_t column) {
  const int64_t at = x.flat_offset(row) + column * x.column_stride;
  return x.kind == Kind::int64 ? static_cast<const int64_t*>(x.data)[at] : static_cast<const int32_t*>(x.data)[at];
}

// 1 where there are no weights.
__device__ inline double weight_of(const Vector& weights, int64_t row) {
  return weights.data ? real_at(weights.data, weights.kind, row * weights.stride) : 1.0;
}

// 16 bytes.
template <class T>
struct alignas(16) Pack {
  static constexpr int SIZE = 16 / sizeof(T);
  T at[SIZE];
};

// Hands out the shared memory of a block, piece by piece. A kernel's pieces are taken in the constructor of a struct,
// which the launcher runs as well, to know how much it has to ask for.
class Shared {
 public:
  __host__ __device__ explicit Shared(char* bytes) : bytes_(bytes) {}

  template <class T>
  __host__ __device__ T* take(int64_t n) {
    const int64_t at = used_, size = n * int64_t(sizeof(T));
    used_ += (size + 15) / 16 * 16;
#if !defined(__CUDACC__)
    if (!bytes_) return static_cast<T*>(simt::take(size));
#endif
    return reinterpret_cast<T*>(bytes_ + at);
  }

  __host__ __device__ int64_t used() const { return used_; }

 private:
  char* bytes_;
  int64_t used_ = 0;
};

template <class Pieces, class... Sizes>
int64_t shared_bytes(Sizes... sizes) {
  Shared measure(reinterpret_cast<char*>(16));
  Pieces(measure, sizes...);
  return measure.used();
}

__device__ inline Shared shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) char bytes[];
  return Shared(bytes);
#else
  return Shared(nullptr);
#endif
}

// The cluster of this block: alone before sm_90, which has none.
__device__ inline int cluster_rank() {
#if !defined(__CUDACC__)
  return int(simt::cluster_rank());
#elif __CUDA_ARCH__ >= 900
  return int(cooperative_groups::this_cluster().block_rank());
#else
  return 0;
#endif
}

__device__ inline int cluster_size() {
#if !defined(__CUDACC__)
  return int(simt::cluster_size());
#elif __CUDA_ARCH__ >= 900
  return int(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}

// What a block of the cluster has where this one has `mine`.
template <class T>
__device__ T* in_block(T* mine, int rank) {
#if !defined(__CUDACC__)
  return static_cast<T*>(simt::in_block_of(mine, unsigned(rank)));
#elif __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, unsigned(rank));
#else
  return mine;
#endif
}

#if !defined(__CUDACC__)
inline void cluster_sync(simt::Site site = simt::Site::here()) { simt::cluster_barrier(site); }
#else
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}
#endif

}  // namespace topk_rkl::cuda
