// Exact top-K of every row, and the loss on those K slots in the same pass.
#include <algorithm>
#include <memory>
#include <utility>

#include "parallel.hpp"
#include "slots.hpp"
#include "stream.hpp"

namespace topk_rkl {
namespace {

// The working memory of one thread, in one piece.
class Workspace {
 public:
  Workspace(const Matrix& logits, int64_t k) {
    memory_.reset(new char[lay_out(nullptr, logits, k)]);
    lay_out(memory_.get(), logits, k);
  }

  void select(const Isa& isa, const Matrix& logits, int64_t row, int64_t k, bool normalize, int32_t* ids,
              float* log_probs) {
    const void* data = contiguous(logits, row, copy_);
    isa.select_row[int(logits.kind)]({data, logits.columns, k, normalize, ids, log_probs}, scratch_);
  }

 private:
  // Gives every part its place in the memory, in whole lines, and returns how many bytes they take.
  int64_t lay_out(char* memory, const Matrix& logits, int64_t k) {
    const int64_t size = size_of(logits.kind);
    const int64_t groups = logits.columns / GROUP + MAX_BLOCK / GROUP + 1, chosen = std::min(k, groups);
    const int64_t columns = chosen * GROUP + MAX_BLOCK;
    int64_t used = 0;
    const auto take = [&]<class T>(T*& part, int64_t bytes) {
      const int64_t at = std::exchange(used, used + (bytes + LINE - 1) / LINE * LINE);
      part = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory) + at);
    };
    take(scratch_.maxima, groups * size);
    take(scratch_.remainder, MAX_BLOCK * size);
    take(scratch_.groups, chosen * 4);
    take(scratch_.keys, columns * size);
    take(scratch_.columns, columns * 4);
    take(scratch_.items, k * 8);
    take(scratch_.spare, k * 8);
    take(copy_, logits.column_stride == 1 ? 0 : logits.columns * size);
    return used;
  }

  std::unique_ptr<char[]> memory_;
  Scratch scratch_;
  char* copy_;
};

std::vector<Workspace> workspaces(const Matrix& logits, int64_t k, int threads) {
  std::vector<Workspace> all;
  for (int i = 0; i < std::min<int64_t>(logits.rows, threads); ++i) all.emplace_back(logits, k);
  return all;
}

}  // namespace

void select(const Select& op, int threads) {
  const Isa& isa = current_isa();
  auto workspace = workspaces(op.logits, op.ids.columns, threads);
  for_each_row(op.logits.rows, threads, grain_of(op.logits.columns), [&](int thread, int64_t row) {
    workspace[thread].select(isa, op.logits, row, op.ids.columns, op.normalize, op.ids[row], op.log_probs[row]);
  });
}

void select_loss(const SelectLoss& op, int threads) {
  const Isa& isa = current_isa();
  const int64_t n = op.teacher.rows, k = op.ids.columns;
  auto workspace = workspaces(op.teacher, k, threads);
  std::vector<Slots> slots(threads, Slots(k));
  std::vector<std::vector<float>> log_probs(threads, std::vector<float>(k));
  for_each_row(n, threads, grain_of(op.teacher.columns), [&](int thread, int64_t row) {
    float* const selected = log_probs[thread].data();
    if (op.weights.value_or_1(row) == 0) {
      std::fill_n(op.ids[row], k, -1);
    } else {
      workspace[thread].select(isa, op.teacher, row, k, false, op.ids[row], selected);
    }
    // The thread's buffer stands in for the log-probs of every row.
    const Matrix ids{op.ids.data, Kind::int32, n, k, k, 1}, same{selected, Kind::float32, n, k, 0, 1};
    loss_row({op.student, ids, same, op.weights, op.objective, op.loss, op.g}, row, isa, slots[thread]);
  });
}

}  // namespace topk_rkl
