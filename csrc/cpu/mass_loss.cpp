// The loss with the rest of the vocabulary as one more class: one read of the student's row forwards, one backwards.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "loss.hpp"
#include "parallel.hpp"

namespace topk_rkl {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
// Columns at a time, which stay in the first cache.
constexpr int64_t BLOCK = 1024;
static_assert(BLOCK % HEAD_BLOCK == 0);

// Of the columns outside S: the largest, or 0 for -inf, and the sum of exp((x - it) / T).
struct Rest {
  double peak, total;
};

// One thread's memory for blocks of rows of these logits.
class Reader {
 public:
  Reader(const Matrix& logits) : logits_(logits), copy_(logits.step == 1 ? 0 : logits.columns * size_of(logits.kind)) {}

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

Rest rest_row(const Isa& isa, Reader& reader, const Matrix& ids, int64_t row, int64_t k, double inv_t) {
  double peak = -INF, total = 0;
  int64_t next = 0;
  reader.visit(isa, row, [&](int64_t start, int64_t n, float* x) {
    for (; next < k; ++next) {
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

// As a logit.
double logit_of(const Rest& rest, double temperature) { return rest.peak + temperature * std::log(rest.total); }

void write(const Isa& isa, const Matrix& out, int64_t row, int64_t start, int64_t n, const float* x) {
  char* to = out.at(row, start);
  if (out.step != 1 || out.kind == Kind::float16) {
    const int64_t step = out.step * size_of(out.kind);
    for (int64_t i = 0; i < n; ++i) store(to + i * step, out.kind, x[i]);
  } else if (out.kind == Kind::float32) {
    std::memcpy(to, x, n * sizeof(float));
  } else {
    isa.head.round_bfloat16(x, to, n);
  }
}

}  // namespace

void tail_logit(const Matrix& logits, int64_t n, int64_t k, const Matrix& ids, double temperature, int threads, double* out) {
  const Isa& isa = current_isa();
  std::vector<Reader> readers(threads, Reader(logits));
  for_each_row(n, threads, grain_of(logits.columns), [&](int thread, int64_t row) {
    out[row] = logit_of(rest_row(isa, readers[thread], ids, row, k, 1 / temperature), temperature);
  });
}

void mass_loss(const Matrix& student, int64_t n, int64_t k, const Matrix& ids, const Matrix& values, const Vector& tail,
               const Vector& weights, double temperature, const Objective& objective, int threads, float* loss,
               float* g, double* others) {
  const Isa& isa = current_isa();
  std::vector<Reader> readers(threads, Reader(student));
  std::vector<Slots> all(threads, Slots(k + 1));
  for_each_row(n, threads, grain_of(student.columns), [&](int thread, int64_t row) {
    Slots& slots = all[thread];
    Rest rest = {};
    const double weight = weights.data ? weights[row] : 1;
    slots.clear();
    if (weight != 0) {
      slots.add_row(student, ids, values, row, k);
      rest = rest_row(isa, readers[thread], ids, row, k, 1 / temperature);
      // Where the teacher leaves nothing, there is, as on any slot, nothing to compare.
      const bool compared = objective.mass != Mass::tail || tail[row] != -INF;
      if (compared) slots.add(k, logit_of(rest, temperature), tail[row]);
    }
    loss[row] = float(slots.solve(isa, objective, temperature, weight));
    std::fill_n(g + row * k, k, 0.0f);
    double of_rest = 0;
    for (int64_t i = 0; i < slots.live(); ++i) {
      if (slots.slot(i) == k) of_rest = slots.g(i);
      else g[row * k + slots.slot(i)] = float(slots.g(i));
    }
    others[2 * row] = rest.peak;
    // Within float32, since inf times an exponential that is 0 would be NaN.
    others[2 * row + 1] = of_rest == 0 ? 0 : std::clamp<double>(of_rest / rest.total, -FLT_MAX, FLT_MAX);
  });
}

void mass_grad(const Matrix& g, const Matrix& ids, const Matrix& others, const Vector& grad_output, const Matrix& student,
            const Matrix& out, int64_t n, int64_t k, double temperature, int threads) {
  const Isa& isa = current_isa();
  std::vector<Reader> readers(threads, Reader(student));
  for_each_row(n, threads, grain_of(out.columns), [&](int thread, int64_t row) {
    const double peak = load(others.at(row, 0), Kind::float64), scale = grad_output[row];
    const float factor = product(load(others.at(row, 1), Kind::float64), scale);
    const auto inv_t = float(1 / temperature);
    readers[thread].visit(isa, row, [&](int64_t start, int64_t size, float* x) {
      if (factor == 0 || factor != factor) std::fill_n(x, size, factor);
      else isa.blocks.scale(x, size, float(peak), inv_t, factor);
      write(isa, out, row, start, size, x);
    });
    char* const to = out.at(row);
    const int64_t step = out.step * size_of(out.kind);
    for (int64_t j = 0; j < k; ++j) {
      const int64_t id = load_integer(ids.at(row, j), ids.kind);
      if (id < 0 || id >= out.columns) continue;
      store(to + id * step, out.kind, product(*reinterpret_cast<const float*>(g.at(row, j)), scale));
    }
  });
}

}  // namespace topk_rkl
