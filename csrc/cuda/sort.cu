#include "sort.hpp"

#if defined(__CUDACC__)

#include <cub/device/device_radix_sort.cuh>

#include "launch.hpp"

namespace topk_rkl::cuda {
namespace {

cudaError_t run(const Pairs& p, void* scratch, size_t& bytes, void* stream) {
  return cub::DeviceRadixSort::SortPairs(scratch, bytes, p.keys, p.sorted_keys, p.values, p.sorted_values, p.count, 0,
                                         p.bits, static_cast<cudaStream_t>(stream));
}

}  // namespace

int64_t sort_scratch(const Pairs& pairs, int device) {
  const std::string what = "the scratch of a sort of " + std::to_string(pairs.count) + " pairs";
  const DeviceGuard guard(device, what);
  size_t bytes = 0;
  check(run(pairs, nullptr, bytes, nullptr), what);
  return int64_t(bytes);
}

void sort_pairs(const Pairs& pairs, void* scratch, const Where& where) {
  const std::string what = "the sort of " + std::to_string(pairs.count) + " pairs";
  const DeviceGuard guard(where.device, what);
  auto bytes = size_t(sort_scratch(pairs, where.device));
  check(run(pairs, scratch, bytes, where.stream), what);
}

}  // namespace topk_rkl::cuda

#else

#include <algorithm>
#include <numeric>
#include <vector>

namespace topk_rkl::cuda {

int64_t sort_scratch(const Pairs&, int) { return 0; }

void sort_pairs(const Pairs& p, void*, const Where&) {
  std::vector<uint32_t> order(size_t(p.count));
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return p.keys[a] < p.keys[b]; });
  for (int64_t i = 0; i < p.count; ++i) {
    p.sorted_keys[i] = p.keys[order[size_t(i)]];
    p.sorted_values[i] = p.values[order[size_t(i)]];
  }
}

}  // namespace topk_rkl::cuda

#endif
