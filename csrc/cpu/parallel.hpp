// Work shared by the threads that torch would use.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace topk_rkl {

// Calls work(thread, row) once for each row, on at most `threads` threads, `grain` rows at a time. work must not throw.
void for_each_row(int64_t rows, int threads, int64_t grain, const std::function<void(int, int64_t)>& work);

// How many rows a thread asks for at a time: enough elements, 2^15, that asking costs nothing beside them.
inline int64_t grain_of(int64_t elements_per_row) { return std::max<int64_t>(1, (1 << 15) / elements_per_row); }

}  // namespace topk_rkl
