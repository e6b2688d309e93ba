// From hidden states: the loss of a row with K rows of the head, and the gradient of the head summed over all rows.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "loss.hpp"
#include "parallel.hpp"
#include "stream.hpp"

namespace topk_rkl {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
// Bytes of the head's gradient that a thread takes at a time.
constexpr int64_t SHARE = 1 << 18;
// Terms that are added up before they join the sum of the others, so that a long sum does not lose bits.
constexpr int64_t TERMS = 256;
// Fetched of the next row while one is read; the processor then goes on by itself.
constexpr int64_t AHEAD = 4096;

std::vector<float> zeros(int64_t width) { return std::vector<float>((width + HEAD_BLOCK - 1) / HEAD_BLOCK * HEAD_BLOCK); }

// The sum of factors[j] rows[j], each of `out.size()` elements at most.
void sum_rows(const Isa& isa, Kind kind, const void* const* rows, const float* factors, int64_t count, int64_t width,
              std::vector<float>& out) {
  std::fill(out.begin(), out.end(), 0.0f);
  for (int64_t i = 0; i < count; i += TERMS) {
    isa.head.add_rows[int(kind)](rows + i, factors + i, std::min(TERMS, count - i), width, out.data());
  }
}

struct Problem {
  const Isa& isa;
  const Matrix &hidden, &head;
  int64_t vocab;
  const Vector& bias;
  const Matrix &ids, &values;
  int64_t k;
  double temperature, logit_scale, softcap;
  const Objective& objective;
};

// One thread at work on it.
class Worker {
 public:
  explicit Worker(const Problem& problem)
      : at_(problem), slots_(at_.k), x_(zeros(at_.head.columns)), sum_(x_), slopes_(at_.k), rows_(at_.k), factors_(at_.k),
        copies_((at_.k + 1) * at_.head.columns * (at_.head.step == 1 && at_.hidden.step == 1 ? 0 : 4)) {}

  void run(int64_t row, double weight, float* loss, float* g, float* dhidden) {
    slots_.clear();
    if (weight != 0) multiply(row);
    *loss = float(slots_.solve(at_.isa, at_.objective, at_.temperature, weight));
    std::fill_n(g, at_.k, 0.0f);
    int64_t count = 0;
    for (int64_t i = 0; i < slots_.live(); ++i) {
      const auto factor = float(slots_.g(i) == 0 ? 0 : slots_.g(i) * slopes_[i]);
      if (factor == 0) continue;  // its row of the head need not even be finite
      rows_[count] = rows_[i];
      factors_[count++] = g[slots_.slot(i)] = factor;
    }
    if (!dhidden) return;
    sum_rows(at_.isa, at_.head.kind, rows_.data(), factors_.data(), count, at_.head.columns, sum_);
    std::copy_n(sum_.data(), at_.head.columns, dhidden);
  }

 private:
  // The logits of the live slots.
  void multiply(int64_t row) {
    const int64_t bytes = at_.head.columns * 4;
    const void* hidden = contiguous(at_.hidden, row, copies_.data());
    const float one = 1;
    sum_rows(at_.isa, at_.hidden.kind, &hidden, &one, 1, at_.hidden.columns, x_);  // as float32
    for (int64_t j = 0; j < at_.k; ++j) {
      const int64_t id = id_of(row, j);
      const double w = load(at_.values.at(row, j), at_.values.kind);
      if (id < 0 || w == -INF) continue;
      if (id >= at_.vocab) {
        slots_.leave_out(w);
        continue;
      }
      if (j + 1 < at_.k) prefetch(id_of(row, j + 1));
      const int64_t i = slots_.live();
      rows_[i] = contiguous(at_.head, id, copies_.empty() ? nullptr : copies_.data() + (i + 1) * bytes);
      double z = at_.isa.head.dot[int(at_.head.kind)](rows_[i], x_.data(), at_.head.columns);
      if (at_.bias.data) z += at_.bias[id];
      slots_.add(j, capped(z, slopes_[i]), w);
    }
  }

  // As divergence.capped.
  double capped(double raw, double& slope) const {
    const double z = raw * at_.logit_scale;
    slope = at_.logit_scale;
    if (at_.softcap == 0) return z;
    const double bent = std::tanh(z / at_.softcap);
    slope *= 1 - bent * bent;
    return at_.softcap * bent;
  }

  int64_t id_of(int64_t row, int64_t j) const { return load_integer(at_.ids.at(row, j), at_.ids.kind); }

  void prefetch(int64_t id) const {
    if (id < 0 || id >= at_.vocab || at_.head.step != 1) return;
    const int64_t bytes = std::min(AHEAD, at_.head.columns * size_of(at_.head.kind));
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(at_.head.at(id) + i);
  }

  const Problem& at_;
  Slots slots_;
  std::vector<float> x_, sum_;
  std::vector<double> slopes_;
  std::vector<const void*> rows_;
  std::vector<float> factors_;
  std::vector<char> copies_;
};

// The slots with a gradient, as (id, slot), by id and then by slot.
std::vector<uint64_t> sorted_pairs(const Matrix& g, const Matrix& ids, int64_t n, int64_t k, int64_t vocab) {
  std::vector<uint64_t> pairs;
  pairs.reserve(n * k);
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t j = 0; j < k; ++j) {
      const int64_t id = load_integer(ids.at(row, j), ids.kind);
      const bool live = id >= 0 && id < vocab && *reinterpret_cast<const float*>(g.at(row, j)) != 0;
      if (live) pairs.push_back(uint64_t(id) << 32 | uint64_t(row * k + j));
    }
  }
  std::vector<uint64_t> spare(pairs.size());
  sort_by_key(pairs.data(), spare.data(), int64_t(pairs.size()), (std::bit_width(uint64_t(vocab - 1)) + 7) / 8);
  return pairs;
}

// Past the caches where that is asked for and the row lies on whole lines.
void write_row(const Matrix& out, int64_t row, const char* from, bool streamed) {
  const int64_t size = size_of(out.kind), bytes = out.columns * size;
  char* to = out.at(row);
  if (out.step != 1) {
    for (int64_t i = 0; i < out.columns; ++i) std::memcpy(out.at(row, i), from + i * size, size);
  } else if (streamed && reinterpret_cast<uintptr_t>(to) % LINE == 0 && bytes % LINE == 0) {
    for (int64_t i = 0; i < bytes; i += LINE) stream_line(to + i, from + i);
  } else {
    std::memcpy(to, from, bytes);
  }
}

// One thread at work on the gradient of the head.
struct Summer {
  Summer(const Isa& isa, const Matrix& hidden)
      : isa(isa), hidden(hidden.kind), width(hidden.columns), sum(zeros(width)), rounded(sum), zero(sum) {}

  // A row of the gradient.
  const char* row(Kind kind) {
    if (rows.empty()) return reinterpret_cast<const char*>(zero.data());
    sum_rows(isa, hidden, rows.data(), factors.data(), int64_t(rows.size()), width, sum);
    if (kind == Kind::float32) return reinterpret_cast<const char*>(sum.data());
    char* to = reinterpret_cast<char*>(rounded.data());
    if (kind == Kind::bfloat16) {
      isa.head.round_bfloat16(sum.data(), to, width);
    } else {
      for (int64_t i = 0; i < width; ++i) store(to + 2 * i, kind, sum[i]);
    }
    return to;
  }

  const Isa& isa;
  Kind hidden;
  int64_t width;
  std::vector<float> sum, rounded, zero;
  std::vector<const void*> rows;
  std::vector<float> factors;
};

}  // namespace

void linear_loss(const Matrix& hidden, const Matrix& head, int64_t vocab, const Vector& bias, int64_t n, int64_t k,
                 const Matrix& ids, const Matrix& values, const Vector& weights, double temperature, double logit_scale,
                 double softcap, const Objective& objective, int threads, float* loss, float* g, float* dhidden) {
  const Problem problem{current_isa(), hidden, head, vocab, bias, ids, values, k, temperature, logit_scale, softcap,
                        objective};
  threads = int(std::clamp<int64_t>(n, 1, threads));
  std::vector<Worker> workers(threads, Worker(problem));
  for_each_row(n, threads, 1, [&](int thread, int64_t row) {
    workers[thread].run(row, weights.data ? weights[row] : 1, loss + row, g + row * k,
                        dhidden ? dhidden + row * hidden.columns : nullptr);
  });
}

void linear_weight_grad(const Matrix& g, const Matrix& ids, const Matrix& hidden, int64_t n, int64_t k,
                             int64_t vocab, const Matrix& dhead, const Vector& dbias, int threads) {
  const Isa& isa = current_isa();
  const auto pairs = sorted_pairs(g, ids, n, k, vocab);
  const int64_t row_bytes = hidden.columns * size_of(dhead.kind), share = std::max<int64_t>(1, SHARE / row_bytes);
  const bool streamed = dhead.data && vocab * row_bytes >= STREAMED_BYTES;
  if (streamed) want_huge_pages(dhead, vocab);
  std::vector<Summer> summers(threads, Summer(isa, hidden));
  for_each_row((vocab + share - 1) / share, threads, 1, [&](int thread, int64_t part) {
    Summer& mine = summers[thread];
    const int64_t first = part * share, last = std::min(vocab, first + share);
    auto pair = std::lower_bound(pairs.begin(), pairs.end(), uint64_t(first) << 32);
    for (int64_t id = first; id < last; ++id) {
      double bias = 0;
      mine.rows.clear(), mine.factors.clear();
      for (; pair != pairs.end() && int64_t(*pair >> 32) == id; ++pair) {
        const int64_t slot = int64_t(*pair & 0xffffffff);
        mine.rows.push_back(hidden.at(slot / k));
        mine.factors.push_back(*reinterpret_cast<const float*>(g.at(slot / k, slot % k)));
        bias += mine.factors.back();
      }
      if (dbias.data) store(dbias.at(id), dbias.kind, float(bias));
      if (dhead.data) write_row(dhead, id, mine.row(dhead.kind), streamed);
    }
    end_of_stream();
  });
}

}  // namespace topk_rkl
