// What the kernels ask of CUDA, for the host: a thread is a fibre, which runs alone from one point of synchronisation
// to the next, in an order drawn anew each time; so a barrier that is missing shows as a wrong result.
//
// Every piece of shared memory is an allocation of its own, of exactly its size and full of 0xff, so that AddressSanitizer
// sees a step outside and a read before a write gives NaN. What does not meet at a barrier is an error that names both.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../types.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace simt {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// A line of a kernel at which threads wait for each other.
struct Site {
  const char* file;
  int line;
  std::string name() const;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Launch {
  Index grid;
  int threads, cluster;
  int64_t shared_bytes;
};

// Throws where threads wait for each other in vain.
void run(const char* kernel, const Launch& launch, const std::function<void()>& body);

// The shared memory that the kernel takes next; the same for all threads of a block.
void* take(int64_t bytes);

// Barriers. A dropped one is as if its line were not there.
void block_barrier(Site site);
int block_barrier_or(int vote, Site site);
void warp_barrier(unsigned mask, Site site);
void cluster_barrier(Site site);

// The values of the 32 lanes, of those that the mask names.
const uint64_t* exchange(unsigned mask, uint64_t value, Site site);

unsigned lane();
unsigned cluster_rank();
unsigned cluster_size();
void* in_block_of(const void* mine, unsigned rank);

void copy_async(void* to, const void* from, int64_t bytes);
void commit_copies();
void wait_copies(int groups_left);

// For tests: the order of the threads from now on; the barriers met since then; one to leave out, "" for none; and how
// many bytes each piece of shared memory is to be too short.
void seed(uint64_t value);
std::vector<std::string> sites();
void drop(const std::string& site);
void shorten(int64_t bytes);

template <class T>
T shuffle(unsigned mask, T value, unsigned from, Site site) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* all = exchange(mask, bits, site);
  T result;
  std::memcpy(&result, &all[from & 31], sizeof result);
  return result;
}

}  // namespace simt

inline simt::Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline void __syncthreads(simt::Site site = simt::Site::here()) { simt::block_barrier(site); }
inline int __syncthreads_or(int vote, simt::Site site = simt::Site::here()) {
  return simt::block_barrier_or(vote, site);
}
inline void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::Site::here()) { simt::warp_barrier(mask, site); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, simt::Site site = simt::Site::here()) {
  return simt::shuffle(mask, value, unsigned(from), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, simt::Site site = simt::Site::here()) {
  return simt::shuffle(mask, value, simt::lane() ^ unsigned(bits), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, simt::Site site = simt::Site::here()) {
  const unsigned lane = simt::lane();
  return simt::shuffle(mask, value, lane < distance ? lane : lane - distance, site);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, simt::Site site = simt::Site::here()) {
  const uint64_t* all = simt::exchange(mask, vote, site);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= unsigned(all[i] != 0) << i;
  return votes & mask;
}
inline bool __any_sync(unsigned mask, bool vote, simt::Site site = simt::Site::here()) {
  return __ballot_sync(mask, vote, site) != 0;
}

template <class T>
T atomicAdd(T* to, T value) {
  return std::exchange(*to, T(*to + value));
}

inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __ffs(uint32_t x) { return x ? std::countr_zero(x) + 1 : 0; }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}

template <topk_rkl::Kind KIND>
struct Narrow {
  uint16_t bits;
};
using __nv_bfloat16 = Narrow<topk_rkl::Kind::bfloat16>;
using __half = Narrow<topk_rkl::Kind::float16>;
template <class T>
struct Pair {
  T x, y;
};
using __nv_bfloat162 = Pair<__nv_bfloat16>;
using __half2 = Pair<__half>;

inline float __bfloat162float(__nv_bfloat16 x) { return float(topk_rkl::load(&x, topk_rkl::Kind::bfloat16)); }
inline float __half2float(__half x) { return float(topk_rkl::load(&x, topk_rkl::Kind::float16)); }
template <topk_rkl::Kind KIND>
Narrow<KIND> narrowed(float x) {
  Narrow<KIND> result;
  topk_rkl::store(reinterpret_cast<char*>(&result), KIND, x);
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return narrowed<topk_rkl::Kind::bfloat16>(x); }
inline __half __float2half_rn(float x) { return narrowed<topk_rkl::Kind::float16>(x); }

// 0xffff in each half where a >= b, or where one of them is NaN.
template <topk_rkl::Kind KIND>
unsigned __hgeu2_mask(Pair<Narrow<KIND>> a, Pair<Narrow<KIND>> b) {
  const auto one = [](Narrow<KIND> x, Narrow<KIND> y) {
    return topk_rkl::load(&x, KIND) < topk_rkl::load(&y, KIND) ? 0u : 0xffffu;
  };
  return one(a.x, b.x) | one(a.y, b.y) << 16;
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  simt::copy_async(to, from, int64_t(bytes));
}
inline void __pipeline_commit() { simt::commit_copies(); }
inline void __pipeline_wait_prior(int groups) { simt::wait_copies(groups); }
