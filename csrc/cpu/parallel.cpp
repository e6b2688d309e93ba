#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace topk_rkl {
namespace {

using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The OpenMP pool that torch has loaded for itself: a second pool would fight its waiting threads for the cores.
Team team_of_torch() {
#if defined(__linux__)
  static const Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return team;
#else
  return nullptr;
#endif
}

}  // namespace

void for_each_row(int64_t rows, int threads, int64_t grain, const std::function<void(int, int64_t)>& work) {
  threads = int(std::clamp<int64_t>((rows + grain - 1) / grain, 1, threads));
  std::atomic<int64_t> next_row = 0;
  std::atomic<int> next_thread = 0;
  auto share = [&] {
    const int thread = next_thread++;
    for (int64_t start; (start = next_row.fetch_add(grain)) < rows;)
      for (int64_t row = start; row < std::min(start + grain, rows); ++row) work(thread, row);
  };
  if (threads == 1) return share();
  if (Team team = team_of_torch()) {
    return team([](void* share_of) { (*static_cast<decltype(share)*>(share_of))(); }, &share, threads, 0);
  }
  std::vector<std::jthread> helpers;
  helpers.reserve(threads - 1);
  try {
    while (int(helpers.size()) < threads - 1) helpers.emplace_back(share);
  } catch (const std::system_error&) {  // no more threads to be had: those that started do it all
  }
  share();
}

}  // namespace topk_rkl
