// Work shared by the threads that torch would use.
#pragma once

#include <cstdint>
#include <functional>

namespace topk_rkl {

// Calls work(thread, row) once for each row, on at most `threads` threads, `grain` rows at a time. work must not throw.
void for_each_row(int64_t rows, int threads, int64_t grain, const std::function<void(int, int64_t)>& work);

}  // namespace topk_rkl
