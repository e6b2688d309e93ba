// Writing past the caches: what is large is not read again soon, and its lines need not be read in order to be written.
#pragma once

#include <cstdint>
#include <cstring>

#include "../types.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace topk_rkl {

constexpr int64_t LINE = 64;  // bytes

// An output of this size is taken to exceed the last cache.
constexpr int64_t STREAMED_BYTES = 32 << 20;

// Both are aligned to a line.
inline void stream_line(char* to, const char* line) {
#if defined(__SSE2__)
  for (int i = 0; i < LINE; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_load_si128(reinterpret_cast<const __m128i*>(line + i)));
  }
#else
  std::memcpy(to, line, LINE);
#endif
}

// The kernel gives new memory page by page as it is first written, which takes longer than the writing itself. Pages of
// 2 MiB take a fraction of it. Only advice, which may be ignored.
inline void want_huge_pages([[maybe_unused]] const Matrix& out) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(out.at(0)) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t last = reinterpret_cast<uintptr_t>(out.at(out.rows - 1, out.columns)) / PAGE * PAGE;
  const bool in_one_piece = out.column_stride == 1 && out.row_stride == out.columns && out.rows <= out.slab_rows;
  if (in_one_piece && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace topk_rkl
