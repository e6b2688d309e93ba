// The stable sort of pairs by key: CUB's on a GPU, the standard library's on the host.
#pragma once

#include "cuda.hpp"

namespace topk_rkl::cuda {

// Of keys below 2^bits.
struct Pairs {
  const uint32_t *keys, *values;        // (count)
  uint32_t *sorted_keys, *sorted_values;  // (count)
  int64_t count;
  int bits;
};

int64_t sort_scratch(const Pairs& pairs, int device);
void sort_pairs(const Pairs& pairs, void* scratch, const Where& where);

}  // namespace topk_rkl::cuda
