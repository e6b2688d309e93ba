// What is compiled once for each instruction set: selection from one row.
#pragma once

#include "types.hpp"

namespace topk_rkl {

// Neighbouring columns that share one maximum.
constexpr int64_t GROUP = 64;
// Columns scanned at a time, at most: one group a lane of the widest vector.
constexpr int64_t MAX_BLOCK = 32 * GROUP;

// The working memory of one thread. Every size follows from V and K, so that nothing can overflow.
struct Scratch {
  void* maxima;         // ceil(V / GROUP) keys, rounded up to whole blocks
  void* tail;           // MAX_BLOCK columns: what is left of the row after its whole blocks, filled up with -inf
  int32_t* groups;      // K, or all where K groups are the whole row
  void* keys;           // of the columns of those groups
  int32_t* columns;     // theirs
  uint64_t* items;      // K
  uint64_t* spare;      // K
};

struct Row {
  const void* data;  // contiguous
  int64_t vocab, k;
  bool normalize;
  int32_t* ids;   // K
  float* values;  // K
};

using SelectRow = void (*)(const Row&, const Scratch&);

struct Isa {
  const char* name;
  bool (*runs_here)();
  SelectRow select_row[3];  // by Kind
};

extern const Isa isa_portable;
#if defined(TOPK_RKL_X86)
extern const Isa isa_avx2, isa_avx512;
#endif

}  // namespace topk_rkl
