// The gradient of the head and of its bias, summed over the slots of all rows.
#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "cpu.hpp"
#include "linear_rows.hpp"
#include "parallel.hpp"
#include "stream.hpp"

namespace topk_rkl {
namespace {

// Bytes of the gradient that a thread takes at a time.
constexpr int64_t SHARE = 1 << 18;

// The slots with a gradient, as (id, slot), by id and then by slot.
std::vector<uint64_t> sorted_pairs(const LinearWeightGrad& op) {
  const int64_t k = op.ids.columns, vocab = op.vocab();
  std::vector<uint64_t> pairs;
  pairs.reserve(op.slots());
  for (int64_t row = 0; row < op.ids.rows; ++row) {
    for (int64_t j = 0; j < k; ++j) {
      const int64_t id = load_integer(op.ids.at(row, j), op.ids.kind);
      if (id >= 0 && id < vocab && op.g[row][j] != 0) pairs.push_back(uint64_t(id) << 32 | uint64_t(row * k + j));
    }
  }
  std::vector<uint64_t> spare(pairs.size());
  sort_by_key(pairs.data(), spare.data(), int64_t(pairs.size()), (std::bit_width(uint64_t(vocab - 1)) + 7) / 8);
  return pairs;
}

// Past the caches if `streamed` and the row lies on whole lines.
void write_row(const Matrix& out, int64_t row, const char* from, bool streamed) {
  const int64_t size = size_of(out.kind), bytes = out.columns * size;
  char* to = out.at(row);
  if (out.column_stride != 1) {
    for (int64_t i = 0; i < out.columns; ++i) std::memcpy(out.at(row, i), from + i * size, size);
  } else if (streamed && reinterpret_cast<uintptr_t>(to) % LINE == 0 && bytes % LINE == 0) {
    for (int64_t i = 0; i < bytes; i += LINE) stream_line(to + i, from + i);
  } else {
    std::memcpy(to, from, bytes);
  }
}

// One thread at work.
class Worker {
 public:
  Worker(const LinearWeightGrad& op, const Isa& isa)
      : op_(op), isa_(isa), sum_(padded_row(op.hidden.columns)), rounded_(sum_), zero_(sum_) {}

  // Writes the row of an id whose pairs start at `pair`, and returns where the next id's start.
  template <class Pair>
  Pair run(int64_t id, Pair pair, Pair end, bool streamed) {
    double bias = 0;
    rows_.clear(), factors_.clear();
    for (; pair != end && int64_t(*pair >> 32) == id; ++pair) {
      const int64_t slot = int64_t(*pair & 0xffffffff);
      rows_.push_back(op_.hidden.at(slot / op_.ids.columns));
      factors_.push_back(op_.g.data[slot]);
      bias += factors_.back();
    }
    if (op_.dbias.data) store(op_.dbias.at(id), op_.dbias.kind, float(bias));
    if (op_.dhead.data) write_row(op_.dhead, id, sum_of_pairs(), streamed);
    return pair;
  }

 private:
  // In the kind of the head's gradient.
  const char* sum_of_pairs() {
    if (rows_.empty()) return reinterpret_cast<const char*>(zero_.data());
    const Kind kind = op_.dhead.kind;
    const int64_t width = op_.hidden.columns;
    sum_rows(isa_, op_.hidden.kind, rows_.data(), factors_.data(), int64_t(rows_.size()), width, sum_);
    if (kind == Kind::float32) return reinterpret_cast<const char*>(sum_.data());
    char* to = reinterpret_cast<char*>(rounded_.data());
    if (kind == Kind::bfloat16) {
      isa_.head.round_bfloat16(sum_.data(), to, width);
    } else {
      for (int64_t i = 0; i < width; ++i) store(to + 2 * i, kind, sum_[i]);
    }
    return to;
  }

  const LinearWeightGrad& op_;
  const Isa& isa_;
  std::vector<float> sum_, rounded_, zero_;
  std::vector<const void*> rows_;
  std::vector<float> factors_;
};

}  // namespace

void linear_weight_grad(const LinearWeightGrad& op, int threads) {
  const auto pairs = sorted_pairs(op);
  const int64_t vocab = op.vocab(), row_bytes = op.hidden.columns * size_of(op.dhead.kind);
  const int64_t share = std::max<int64_t>(1, SHARE / row_bytes);
  const bool streamed = op.dhead.data && vocab * row_bytes >= STREAMED_BYTES;
  if (streamed) want_huge_pages(op.dhead);
  std::vector<Worker> workers(threads, Worker(op, current_isa()));
  for_each_row((vocab + share - 1) / share, threads, 1, [&](int thread, int64_t part) {
    const int64_t first = part * share, last = std::min(vocab, first + share);
    auto pair = std::lower_bound(pairs.begin(), pairs.end(), uint64_t(first) << 32);
    for (int64_t id = first; id < last; ++id) pair = workers[thread].run(id, pair, pairs.end(), streamed);
    end_of_stream();
  });
}

}  // namespace topk_rkl
