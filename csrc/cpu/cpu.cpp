#include "cpu.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>

#include "loss.hpp"
#include "parallel.hpp"
#include "stream.hpp"

namespace topk_rkl {
namespace {

constexpr const Isa* ALL[] = {
#if defined(TOPK_RKL_X86)
    &avx512::ISA, &avx2::ISA,
#endif
    &portable::ISA};

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa =
      *std::find_if(std::begin(ALL), std::end(ALL), [](auto one) { return one->runs_here(); });
  return isa;
}

template <class T>
std::vector<std::unique_ptr<T[]>> for_threads(int threads, int64_t size) {
  std::vector<std::unique_ptr<T[]>> all(threads);
  for (auto& one : all) one.reset(new T[size]);
  return all;
}

// The working memory of one thread, in one piece.
class Workspace {
 public:
  Workspace(const Matrix& logits, int64_t k) {
    const int64_t size = size_of(logits.kind);
    const int64_t groups = logits.columns / GROUP + MAX_BLOCK / GROUP + 1;
    const int64_t columns = std::min(k, groups) * GROUP + MAX_BLOCK;
    const int64_t sizes[] = {groups * size,  MAX_BLOCK * size, std::min(k, groups) * 4,
                             columns * size, columns * 4,      k * 8,
                             k * 8,          logits.step == 1 ? 0 : logits.columns * size};
    int64_t at[8], total = 0;
    for (int i = 0; i < 8; ++i) at[i] = std::exchange(total, total + (sizes[i] + 63) / 64 * 64);
    memory_.reset(new char[total]);
    auto part = [&]<class T>(int i, T*& to) { to = reinterpret_cast<T*>(memory_.get() + at[i]); };
    scratch_.maxima = memory_.get() + at[0];
    scratch_.tail = memory_.get() + at[1];
    part(2, scratch_.groups);
    scratch_.keys = memory_.get() + at[3];
    part(4, scratch_.columns);
    part(5, scratch_.items);
    part(6, scratch_.spare);
    copy_ = memory_.get() + at[7];
  }

  void select(const Isa& isa, const Matrix& logits, int64_t row, int64_t k, bool normalize, int32_t* ids,
              float* values) {
    const void* data = contiguous(logits, row, copy_);
    isa.select_row[int(logits.kind)]({data, logits.columns, k, normalize, ids, values}, scratch_);
  }

 private:
  std::unique_ptr<char[]> memory_;
  Scratch scratch_;
  char* copy_;
};

std::vector<Workspace> workspaces(const Matrix& logits, int64_t n, int64_t k, int threads) {
  std::vector<Workspace> all;
  for (int i = 0; i < std::min<int64_t>(n, threads); ++i) all.emplace_back(logits, k);
  return all;
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa* one : ALL)
    if (one->runs_here()) names.emplace_back(one->name);
  return names;
}

const Isa& current_isa() { return *chosen().load(); }

std::string isa() { return current_isa().name; }

void set_isa(const std::string& name) {
  for (const Isa* one : ALL)
    if (one->name == name && one->runs_here()) return chosen().store(one);
  throw std::invalid_argument("no instruction set '" + name + "' on this machine");
}

void select(const Matrix& logits, int64_t n, int64_t k, bool normalize, int threads, int32_t* ids, float* values) {
  const Isa& isa = current_isa();
  auto workspace = workspaces(logits, n, k, threads);
  for_each_row(n, threads, grain_of(logits.columns), [&](int thread, int64_t row) {
    workspace[thread].select(isa, logits, row, k, normalize, ids + row * k, values + row * k);
  });
}

void support_loss(const Matrix& student, int64_t n, int64_t k, const Matrix& ids, const Matrix& values,
                  const Vector& weights, double temperature, const Objective& objective, int threads, float* loss,
                  float* g) {
  const Isa& isa = current_isa();
  std::vector<Slots> slots(threads, Slots(k));
  for_each_row(n, threads, grain_of(64 * k), [&](int thread, int64_t row) {
    const double weight = weights.data ? weights[row] : 1;
    loss_row(isa, student, ids, values, row, k, weight, temperature, objective, slots[thread], loss + row, g + row * k);
  });
}

void select_loss(const Matrix& student, const Matrix& teacher, int64_t n, int64_t k, const Vector& weights,
                 double temperature, const Objective& objective, int threads, float* loss, int32_t* ids, float* g) {
  const Isa& isa = current_isa();
  auto workspace = workspaces(teacher, n, k, threads);
  std::vector<Slots> slots(threads, Slots(k));
  auto values = for_threads<float>(threads, k);
  for_each_row(n, threads, grain_of(teacher.columns), [&](int thread, int64_t row) {
    const double weight = weights.data ? weights[row] : 1;
    float* row_values = values[thread].get();
    if (weight == 0) {
      std::fill_n(ids + row * k, k, -1);
    } else {
      workspace[thread].select(isa, teacher, row, k, false, ids + row * k, row_values);
    }
    const Matrix row_of_values{row_values, Kind::float32, k, 0, 1}, row_of_ids{ids, Kind::int32, k, k, 1};
    loss_row(isa, student, row_of_ids, row_of_values, row, k, weight, temperature, objective, slots[thread],
             loss + row, g + row * k);
  });
}

void scatter(const Matrix& g, const Matrix& ids, const Vector& grad_output, const Matrix& out, int64_t n, int64_t k,
             bool unique, int threads) {
  auto items = for_threads<uint64_t>(threads, 2 * k);
  const bool streamed = n * out.columns * size_of(out.kind) >= STREAMED_BYTES;
  if (streamed) want_huge_pages(out, n);
  for_each_row(n, threads, grain_of(out.columns), [&](int thread, int64_t row) {
    uint64_t* mine = items[thread].get();
    scatter_row(g, ids, grad_output[row], out, row, k, unique, streamed, mine, mine + k);
  });
}

}  // namespace topk_rkl
