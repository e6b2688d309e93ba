// Launches, whose errors become exceptions that name the kernel and the shape.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda.hpp"
#include "device.cuh"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace topk_rkl::cuda {

// What a block may have without asking, if its kernel has no shared memory besides that of `Shared`.
constexpr int64_t FREE_SHARED_BYTES = 48 << 10;

struct Grid {
  int64_t x, y = 1;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;  // blocks, along x
};

#if defined(__CUDACC__)

inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // which would else be met again by the next call
  throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

// Makes a device the current one for as long as this lives; `what` it is for.
class DeviceGuard {
 public:
  DeviceGuard(int device, const std::string& what) {
    check(cudaGetDevice(&before_), what);
    check(cudaSetDevice(device), what + " on device " + std::to_string(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}
inline int processors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }
inline bool has_clusters(int device) { return attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9; }

// Lets a kernel have the shared memory of a launch on the current device. All threads share the limit, and another may
// launch the same kernel with less at any time: so the limit is only ever set to the most that the device has.
inline void allow_shared_memory(const void* kernel, int64_t bytes, int device, const std::string& what) {
  if (bytes <= FREE_SHARED_BYTES) return;
  cudaFuncAttributes of_kernel{};
  check(cudaFuncGetAttributes(&of_kernel, kernel), what);
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - int64_t(of_kernel.sharedSizeBytes);
  if (bytes > most) {
    throw std::runtime_error(what + ": device " + std::to_string(device) + " has " + std::to_string(most) +
                             " bytes of shared memory for a block; use a smaller K or another backend");
  }
  if (of_kernel.maxDynamicSharedSizeBytes >= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most)), what);
}

template <class... Parameters, class... Arguments>
void launch(const std::string& name, void (*kernel)(Parameters...), const Grid& grid, const Where& where,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  const std::string what = name + ", " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " blocks of " +
                           std::to_string(grid.threads) + " threads and " + std::to_string(grid.shared_bytes) + " bytes";
  if (grid.x > 0x7fffffff || grid.y > 0xffff) throw std::runtime_error(what + ": more blocks than a grid has");
  const DeviceGuard guard(where.device, what);
  allow_shared_memory(reinterpret_cast<const void*>(kernel), grid.shared_bytes, where.device, what);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid.x), unsigned(grid.y));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(where.stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(grid.cluster), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), what);
}

#else

template <class... Parameters, class... Arguments>
void launch(const std::string& name, void (*kernel)(Parameters...), const Grid& grid, const Where&,
            Arguments... arguments) {
  simt::run(name.c_str(), {{unsigned(grid.x), unsigned(grid.y), 1}, grid.threads, grid.cluster, grid.shared_bytes},
            [&] { kernel(arguments...); });
}

inline int processors(int) { return 2; }
inline bool has_clusters(int) { return true; }

#endif

// Calls f with an element of the kind of the logits.
template <class F>
void with_kind(Kind kind, F f) {
  if (kind == Kind::bfloat16) f(BFloat16{});
  else if (kind == Kind::float16) f(Float16{});
  else if (kind == Kind::float32) f(float{});
  else throw std::invalid_argument("logits of a kind that no kernel reads");
}

}  // namespace topk_rkl::cuda
