// The loss with the rest of the vocabulary as one more class: one read of the student's row forwards, one backwards.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel.hpp"
#include "slots.hpp"

namespace topk_rkl {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
// Columns at a time, which stay in the first cache.
constexpr int64_t BLOCK = 1024;
static_assert(BLOCK % HEAD_BLOCK == 0);

// Of the columns outside S: the largest, or 0 for -inf, and the sum of exp((x - peak) / T).
struct Tail {
  double peak, total;

  double logit(double temperature) const { return peak + temperature * std::log(total); }
};

// One thread's memory for blocks of rows of these logits.
class Reader {
 public:
  Reader(const Matrix& logits)
      : logits_(logits), copy_(logits.column_stride == 1 ? 0 : logits.columns * size_of(logits.kind)) {}

  // Calls visit(start, n, the block as float32) for every block of the row.
  template <class Visit>
  void visit(const Isa& isa, int64_t row, Visit visit) {
    const char* from = static_cast<const char*>(contiguous(logits_, row, copy_.data()));
    for (int64_t start = 0; start < logits_.columns; start += BLOCK) {
      const int64_t n = std::min(BLOCK, logits_.columns - start);
      isa.blocks.read[int(logits_.kind)](from + start * size_of(logits_.kind), n, block_);
      visit(start, n, block_);
    }
  }

 private:
  const Matrix& logits_;
  std::vector<char> copy_;
  alignas(64) float block_[BLOCK] = {};
};

Tail tail_of_row(const Isa& isa, Reader& reader, const Matrix& ids, int64_t row, double inv_t) {
  double peak = -INF, total = 0;
  int64_t next = 0;
  reader.visit(isa, row, [&](int64_t start, int64_t n, float* x) {
    for (; next < ids.columns; ++next) {
      const int64_t id = load_integer(ids.at(row, next), ids.kind);
      if (id < start || id >= start + n) break;
      x[id - start] = -float(INF);
    }
    const double top = isa.blocks.peak(x, n);
    if (top == -INF || peak != peak) return;
    if (!(top <= peak)) total *= peak == -INF ? 0 : std::exp((peak - top) * inv_t), peak = top;
    total = peak == peak ? total + isa.blocks.sum(x, n, float(peak), float(inv_t)) : peak;
  });
  return {peak == -INF ? 0 : peak, total};
}

void write(const Isa& isa, const Matrix& out, int64_t row, int64_t start, int64_t n, const float* x) {
  char* to = out.at(row, start);
  if (out.column_stride != 1 || out.kind == Kind::float16) {
    const int64_t step = out.column_bytes();
    for (int64_t i = 0; i < n; ++i) store(to + i * step, out.kind, x[i]);
  } else if (out.kind == Kind::float32) {
    std::memcpy(to, x, n * sizeof(float));
  } else {
    isa.head.round_bfloat16(x, to, n);
  }
}

}  // namespace

void tail_logit(const TailLogit& op, int threads) {
  const Isa& isa = current_isa();
  std::vector<Reader> readers(threads, Reader(op.logits));
  for_each_row(op.ids.rows, threads, grain_of(op.logits.columns), [&](int thread, int64_t row) {
    op.out[row] = tail_of_row(isa, readers[thread], op.ids, row, 1 / op.temperature).logit(op.temperature);
  });
}

void mass_loss(const MassLoss& op, int threads) {
  const Isa& isa = current_isa();
  const int64_t k = op.ids.columns;
  const double temperature = op.objective.temperature;
  std::vector<Reader> readers(threads, Reader(op.student));
  std::vector<Slots> all(threads, Slots(k + 1));
  for_each_row(op.ids.rows, threads, grain_of(op.student.columns), [&](int thread, int64_t row) {
    Slots& slots = all[thread];
    Tail tail = {};
    const double weight = op.weights.value_or_1(row);
    slots.clear();
    if (weight != 0) {
      slots.add_row(op.student, op.ids, op.log_probs, row);
      tail = tail_of_row(isa, readers[thread], op.ids, row, 1 / temperature);
      // Where the teacher leaves nothing, there is, as on any slot, nothing to compare.
      const bool compared = op.objective.mass != Mass::tail || op.tail[row] != -INF;
      if (compared) slots.add(k, tail.logit(temperature), op.tail[row]);
    }
    op.loss[row] = float(slots.solve(isa, op.objective, weight));
    float* const g = op.g[row];
    std::fill_n(g, k, 0.0f);
    double tail_g = 0;
    for (int64_t i = 0; i < slots.live(); ++i) {
      if (slots.slot(i) == k) tail_g = slots.g(i);
      else g[slots.slot(i)] = float(slots.g(i));
    }
    op.outside[row][0] = tail.peak;
    // Within float32, since inf times an exponential that is 0 would be NaN.
    op.outside[row][1] = tail_g == 0 ? 0 : std::clamp<double>(tail_g / tail.total, -FLT_MAX, FLT_MAX);
  });
}

void mass_grad(const MassGrad& op, int threads) {
  const Isa& isa = current_isa();
  const Matrix& out = op.out;
  std::vector<Reader> readers(threads, Reader(op.student));
  for_each_row(op.ids.rows, threads, grain_of(out.columns), [&](int thread, int64_t row) {
    const double peak = load(op.outside.at(row, 0), Kind::float64), scale = op.grad_output[row];
    const float factor = product(load(op.outside.at(row, 1), Kind::float64), scale);
    const auto inv_t = float(1 / op.temperature);
    readers[thread].visit(isa, row, [&](int64_t start, int64_t size, float* x) {
      if (factor == 0 || factor != factor) std::fill_n(x, size, factor);
      else isa.blocks.scale(x, size, float(peak), inv_t, factor);
      write(isa, out, row, start, size, x);
    });
    char* const to = out.at(row);
    const int64_t step = out.column_bytes();
    for (int64_t j = 0; j < op.ids.columns; ++j) {
      const int64_t id = load_integer(op.ids.at(row, j), op.ids.kind);
      if (id < 0 || id >= out.columns) continue;
      store(to + id * step, out.kind, product(*reinterpret_cast<const float*>(op.g.at(row, j)), scale));
    }
  });
}

}  // namespace topk_rkl
