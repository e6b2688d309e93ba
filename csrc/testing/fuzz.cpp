// Bytes give rows, K, a kind and strides. Every instruction set must select as a stable sort does. The loss and the
// gradient follow on what was selected, and then with the matrix as a head.
//
// `fuzz SECONDS [SEED]` draws the bytes itself; with clang's -fsanitize=fuzzer libFuzzer does.
// `fuzz plant` reads one element past a row, to show that a sanitizer is on.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../cpu/cpu.hpp"

using namespace topk_rkl;

namespace {

struct Case {
  Kind kind;
  int64_t n, vocab, k, row_stride, column_stride, slab_rows, slab_stride;
  std::unique_ptr<char[]> memory;  // exactly as large as the matrix reaches, so that a step past it shows

  Matrix matrix() const { return {memory.get(), kind, n, vocab, row_stride, column_stride, slab_rows, slab_stride}; }
};

Case case_of(const uint8_t* bytes, size_t size) {
  uint64_t head[2] = {};
  std::memcpy(head, bytes, std::min(size, sizeof head));
  Case c;
  c.kind = Kind(head[0] % 3);
  c.n = (head[1] >> 32) % 16 ? 1 + (head[0] >> 8) % 3 : 100;  // enough for several threads
  c.vocab = 1 + (head[0] >> 16) % ((head[0] >> 10) % 4 ? 300 : 9000);
  c.k = 1 + (head[0] >> 32) % ((head[0] >> 12) % 4 ? std::min<int64_t>(c.vocab, 40) : c.vocab);
  c.column_stride = (head[1] % 4) ? 1 : 1 + (head[1] >> 8) % 3;
  c.row_stride = (head[1] >> 16) % 5 ? c.vocab * c.column_stride + (head[1] >> 24) % 7 : (head[1] >> 24) % 7;
  c.slab_rows = 1 + (head[1] >> 36) % (2 * c.n);
  c.slab_stride = c.slab_rows * c.row_stride + (head[1] >> 44) % 3 * c.vocab;
  const int64_t last = (c.n - 1) / c.slab_rows * c.slab_stride + (c.n - 1) % c.slab_rows * c.row_stride;
  const int64_t elements = last + (c.vocab - 1) * c.column_stride + 1, total = elements * size_of(c.kind);
  c.memory.reset(new char[total]);
  for (int64_t i = 0; i < total; ++i) c.memory[i] = size > 16 ? char(bytes[16 + i % (size - 16)]) : 0;
  return c;
}

void require(bool condition, const char* what, const Case& c) {
  if (condition) return;
  std::fprintf(stderr, "%s: kind %d, n %ld, V %ld, K %ld, strides %ld and %ld, slabs of %ld rows and stride %ld, %s\n",
               what, int(c.kind), long(c.n), long(c.vocab), long(c.k), long(c.row_stride), long(c.column_stride),
               long(c.slab_rows), long(c.slab_stride), isa().c_str());
  std::abort();
}

// NaN above everything, -0.0 equal to +0.0, and the lower id first.
std::vector<int32_t> stable_order(const Case& c, int64_t row) {
  std::vector<double> x(c.vocab);
  for (int64_t i = 0; i < c.vocab; ++i) x[i] = load(c.matrix().at(row, i), c.kind);
  std::vector<int32_t> ids(c.vocab);
  for (int64_t i = 0; i < c.vocab; ++i) ids[i] = int32_t(i);
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
    if (std::isnan(x[a]) || std::isnan(x[b])) return std::isnan(x[a]) && !std::isnan(x[b]);
    return x[a] > x[b];
  });
  for (int32_t& id : ids)
    if (x[id] == -INFINITY) id = -1;
  return ids;
}

// Any family, with parameters at which a distribution is at distance 0 from itself.
Divergence divergence_of(const Case& c) {
  switch (c.vocab % 4) {
    case 0: return {};
    case 1: return {Family::clamped, {-1, 1}};
    case 2: return {Family::blended, {0.7, 0.7, 0.3, 0.3}};
    default: return {Family::alpha_beta, {0.4, 0.3}};
  }
}

// NaN is itself.
bool same(float a, float b) { return a == b || (a != a && b != b); }

const Vector NONE{nullptr, Kind::float32, 0, 0};

template <class T>
constexpr Kind KIND = Kind::float32;
template <>
constexpr Kind KIND<int32_t> = Kind::int32;
template <>
constexpr Kind KIND<double> = Kind::float64;

// Contiguous rows, as an output and as an input.
template <class T>
struct Table {
  int64_t n, columns;
  std::vector<T> all;

  Table(int64_t n, int64_t columns, T value = T()) : n(n), columns(columns), all(n * columns, value) {}
  Rows<T> rows() { return {all.data(), columns}; }
  Matrix matrix() { return {all.data(), KIND<T>, n, columns, columns, 1}; }
  Vector vector() { return {all.data(), KIND<T>, n, 1}; }
};

// The gradient with respect to the matrix.
struct Gradient {
  std::vector<char> bytes;
  Matrix matrix;

  explicit Gradient(const Case& c)
      : bytes(c.n * c.vocab * size_of(c.kind)), matrix{bytes.data(), c.kind, c.n, c.vocab, c.vocab, 1} {}
  double at(int64_t row, int64_t column) const { return load(matrix.at(row, column), matrix.kind); }
};

void check(const Case& c, int threads) {
  Table<int32_t> ids(c.n, c.k), same(c.n, c.k);
  Table<float> log_probs(c.n, c.k), loss(c.n, 1), g(c.n, c.k), ones(c.n, 1, 1), factors(c.n, c.k, 1);
  select({c.matrix(), bool(c.vocab % 2), ids.rows(), log_probs.rows()}, threads);
  for (int64_t row = 0; row < c.n; ++row) {
    const auto want = stable_order(c, row);
    require(std::equal(want.begin(), want.begin() + c.k, ids.rows()[row]), "ids", c);
  }
  select_loss({c.matrix(), c.matrix(), NONE, {1, divergence_of(c)}, loss.all.data(), same.rows(), g.rows()}, threads);
  require(ids.all == same.all, "ids of select_loss", c);
  for (float one : loss.all) require(one == 0 || std::isnan(one), "loss of a row and itself", c);
  const Gradient out(c);
  scatter({factors.matrix(), ids.matrix(), ones.vector(), out.matrix, bool(c.k % 2)}, threads);
  for (int64_t row = 0; row < c.n; ++row) {
    double sum = 0, live = 0;
    for (int64_t i = 0; i < c.vocab; ++i) sum += out.at(row, i);
    for (int64_t j = 0; j < c.k; ++j) live += ids.rows()[row][j] >= 0;
    require(sum == live, "gradient", c);
  }
}

// The same with the tail: a row is at distance 0 from itself, and the gradient has no NaN besides.
void check_mass(const Case& c, int threads) {
  Table<int32_t> ids(c.n, c.k);
  Table<float> log_probs(c.n, c.k), loss(c.n, 1), g(c.n, c.k), ones(c.n, 1, 1);
  Table<double> tail(c.n, 1), outside(c.n, 2);
  select({c.matrix(), false, ids.rows(), log_probs.rows()}, threads);
  for (int64_t row = 0; row < c.n; ++row) {
    int32_t* const row_ids = ids.rows()[row];
    float* const values = log_probs.rows()[row];
    std::vector<std::pair<uint32_t, float>> slots;  // -1 is the largest
    for (int64_t j = 0; j < c.k; ++j) slots.emplace_back(uint32_t(row_ids[j]), values[j]);
    std::sort(slots.begin(), slots.end(), [](auto a, auto b) { return a.first < b.first; });
    for (int64_t j = 0; j < c.k; ++j) row_ids[j] = int32_t(slots[j].first), values[j] = slots[j].second;
  }
  tail_logit({c.matrix(), ids.matrix(), 1, tail.all.data()}, threads);
  mass_loss({c.matrix(), ids.matrix(), log_probs.matrix(), tail.vector(), NONE, {1, divergence_of(c), Mass::tail},
             loss.all.data(), g.rows(), outside.rows()},
            threads);
  for (float one : loss.all) require(one == 0 || std::isnan(one), "loss of a row and itself, with the tail", c);
  const Gradient out(c);
  mass_grad({g.matrix(), ids.matrix(), outside.matrix(), ones.vector(), c.matrix(), 1, out.matrix}, threads);
  for (int64_t row = 0; row < c.n; ++row) {
    for (int64_t i = 0; i < c.vocab; ++i) {
      require(std::isnan(loss.all[row]) || out.at(row, i) == 0, "gradient with the tail", c);
    }
  }
}

// The matrix as a head of which a rank has the first rows: their products are those of the whole head, all others 0.
// The gradient of the hidden states is that of linear_loss.
void check_shards(const Case& c, Table<int32_t>& ids, Table<float>& g, const Table<float>& dhidden, int threads) {
  const Matrix head = c.matrix();
  const int64_t n = ids.n, k = ids.columns, first = c.k % c.n;
  Table<float> whole(n, k, NAN), own(n, k, NAN), again(n, c.vocab, NAN);
  linear_logits({head, head, NONE, ids.matrix(), whole.rows()}, threads);
  Matrix part = head;
  part.rows = first;
  linear_logits({head, part, NONE, ids.matrix(), own.rows()}, threads);
  for (int64_t i = 0; i < n * k; ++i) {
    const bool known = ids.all[i] >= 0 && ids.all[i] < c.n, there = known && ids.all[i] < first;
    require(known || whole.all[i] == 0, "product outside", c);
    require(same(own.all[i], there ? whole.all[i] : 0), "product of a shard", c);
  }
  linear_hidden_grad({{g.all.data(), k}, ids.matrix(), head, again.rows()}, threads);
  require(std::equal(again.all.begin(), again.all.end(), dhidden.all.begin(), same), "gradient of hidden states", c);
}

// The matrix as a head of n rows, its first rows as hidden states, K slots each.
void check_head(const Case& c, int threads) {
  const Matrix head = c.matrix();
  const int64_t n = std::min<int64_t>(c.n, 5), k = 1 + c.k % 7, width = c.vocab;
  Table<int32_t> ids(n, k);
  for (int64_t i = 0; i < n * k; ++i) ids.all[i] = int32_t(i * 7 % (c.n + 2)) - 1;
  Table<float> log_probs(n, k, 0.5f), loss(n, 1), g(n, k), dhidden(n, width), dbias(c.n, 1);
  const double softcap = c.k % 2 ? 3 : 0;
  linear_loss({head, head, NONE, ids.matrix(), log_probs.matrix(), NONE,
               {1, divergence_of(c), Mass::renormalized, 1, softcap}, loss.all.data(), g.rows(), dhidden.rows()},
              threads);
  check_shards(c, ids, g, dhidden, threads);
  for (int64_t i = 0; i < n * k; ++i) g.all[i] = float(i % 4);
  if (c.column_stride != 1) return;  // hidden states come with contiguous columns
  const Gradient dhead(c);
  linear_weight_grad({{g.all.data(), k}, ids.matrix(), head, dhead.matrix, dbias.vector()}, threads);
  for (int64_t id = 0; id < c.n; ++id) {
    for (int64_t column = 0; column < width; ++column) {
      double want = 0, size = 0;
      for (int64_t i = 0; i < n * k; ++i) {
        if (ids.all[i] != id || g.all[i] == 0) continue;
        const double term = g.all[i] * load(head.at(i / k, column), c.kind);
        want += term, size += std::abs(term);
      }
      const double got = dhead.at(id, column);
      const double rounding = c.kind == Kind::float32 ? 1e-6 : c.kind == Kind::float16 ? 1e-3 : 8e-3;
      // What overflows on the way may differ.
      const bool near = std::abs(got - want) <= rounding * size + 1e-7;
      require(near || !std::isfinite(want) || size > (c.kind == Kind::float16 ? 6e4 : 1e37), "head", c);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  const Case c = case_of(bytes, size);
  for (const auto& name : isas()) {
    set_isa(name);
    check(c, 1 + size % 3);
    check_mass(c, 1 + size % 3);
    check_head(c, 1 + size % 3);
  }
  return 0;
}

#if !defined(TOPK_RKL_LIBFUZZER)
int main(int count, char** words) {
  if (count > 1 && std::string(words[1]) == "plant") {
    const uint8_t bytes[17] = {};
    Case c = case_of(bytes, sizeof bytes);
    c.vocab += 1;
    std::puts("in bounds");
    std::fflush(stdout);
    check(c, 1);
    std::puts("not caught");
    return 0;
  }
  const double seconds = count > 1 ? std::atof(words[1]) : 5;
  std::mt19937_64 random(count > 2 ? std::atoll(words[2]) : 0);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  long cases = 0;
  for (; std::chrono::steady_clock::now() < end; ++cases) {
    std::vector<uint8_t> bytes(16 + random() % 400 + (random() % 8 ? 0 : 20000));
    // Of few different bytes there are many ties; of all, NaN and infinities of either sign.
    const int mode = int(random() % 3);
    const uint8_t few[4] = {uint8_t(random()), uint8_t(random()), 0x80, 0x7f};
    for (size_t i = 0; i < bytes.size(); ++i) {
      bytes[i] = i < 16 || mode == 0 ? uint8_t(random()) : few[random() % (mode + 2)];
    }
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("%ld cases\n", cases);
}
#endif
