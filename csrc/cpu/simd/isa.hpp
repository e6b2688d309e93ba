// What is compiled once for each instruction set, in a namespace of its name: TOPK_RKL_ISA, which CMake defines. Of the
// standard library such code uses constants only: what is compiled for AVX-512 must never be the copy of an inline
// function that the linker keeps for a machine without it.
#pragma once

#include "../../types.hpp"

namespace topk_rkl {

// Neighbouring columns that share one maximum.
constexpr int64_t GROUP = 64;
// Columns scanned at a time, at most: one group per lane of the widest vector.
constexpr int64_t MAX_BLOCK = 32 * GROUP;

// The working memory of one thread. Every size follows from V and K, so that nothing can overflow.
struct Scratch {
  void* maxima;      // ceil(V / GROUP) keys, rounded up to whole blocks
  void* remainder;   // MAX_BLOCK columns: those of the row after its whole blocks, filled up with -inf
  int32_t* groups;   // K, or all where K groups are the whole row
  void* keys;        // of the columns of those groups
  int32_t* columns;  // of those keys
  uint64_t* items;   // K
  uint64_t* spare;   // K
};

struct Row {
  const void* data;  // contiguous
  int64_t vocab, k;
  bool normalize;
  int32_t* ids;      // K
  float* log_probs;  // K
};

using SelectRow = void (*)(const Row&, const Scratch&);

// The K slots of a row are padded with -inf to a multiple of this.
constexpr int64_t SLOTS = 8;

// Leaves the gradient in g, spoils z and w, and returns the loss.
using SlotsLoss = double (*)(double* z, double* w, double* g, int64_t n, double inv_t);

// x and out are padded to a multiple of this.
constexpr int64_t HEAD_BLOCK = 64;
// By Kind of the rows, which are contiguous.
struct HeadRows {
  double (*dot[3])(const void* row, const float* x, int64_t n);
  // out += the sum over j of factors[j] rows[j]
  void (*add_rows[3])(const void* const* rows, const float* factors, int64_t count, int64_t n, float* out);
  void (*round_bfloat16)(const float* from, char* to, int64_t n);
};

// A row as float32, in blocks of n columns; buffers are padded to a multiple of HEAD_BLOCK.
struct RowBlocks {
  void (*read[3])(const void* from, int64_t n, float* to);  // by Kind
  // The largest, or NaN if one is NaN or +inf.
  float (*peak)(const float* x, int64_t n);
  // The sum of exp((x - peak) inv_t). Here and below no x may be NaN.
  double (*sum)(const float* x, int64_t n, float peak, float inv_t);
  // x = factor exp((x - peak) inv_t), or factor where x is above the peak.
  void (*scale)(float* x, int64_t n, float peak, float inv_t, float factor);
};

struct Isa {
  const char* name;
  bool (*runs_here)();
  const SelectRow* select_row;  // by Kind
  SlotsLoss slots_loss;
  const HeadRows& head;
  const RowBlocks& blocks;
};

// clang-format off
namespace portable { extern const Isa ISA; }
#if defined(TOPK_RKL_X86)
namespace avx2 { extern const Isa ISA; }
namespace avx512 { extern const Isa ISA; }
#endif
// clang-format on

#if defined(TOPK_RKL_ISA)
namespace TOPK_RKL_ISA {
extern const SelectRow SELECT_ROW[3];
double slots_loss(double* z, double* w, double* g, int64_t n, double inv_t);
extern const HeadRows HEAD_ROWS;
extern const RowBlocks ROW_BLOCKS;
}  // namespace TOPK_RKL_ISA
#endif

}  // namespace topk_rkl
