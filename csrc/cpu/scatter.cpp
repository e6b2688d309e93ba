// The dense gradient: zeros and values in one pass over the row.
#include <bit>
#include <cstring>

#include "cpu.hpp"
#include "parallel.hpp"
#include "stream.hpp"

namespace topk_rkl {
namespace {

// The live slots as (column, slot), by column and then slot; empty ones are left out.
int64_t sorted_slots(const Scatter& op, int64_t row, uint64_t* items, uint64_t* spare) {
  const int64_t columns = op.out.columns;
  int64_t live = 0;
  for (int64_t j = 0; j < op.ids.columns; ++j) {
    const int64_t id = load_integer(op.ids.at(row, j), op.ids.kind);
    if (id >= 0 && id < columns) items[live++] = uint64_t(id) << 32 | uint64_t(j);
  }
  sort_by_key(items, spare, live, (std::bit_width(uint64_t(columns - 1)) + 7) / 8);
  return live;
}

// Gives the sum of one column's slots, and moves on to the next column.
float next_value(const float* g, float grad_output, const uint64_t* items, int64_t live, int64_t& i) {
  const uint64_t column = items[i] >> 32;
  float sum = product(g[uint32_t(items[i])], grad_output);
  for (++i; i < live && items[i] >> 32 == column; ++i) sum += product(g[uint32_t(items[i])], grad_output);
  return sum;
}

void stream_row(const Matrix& out, char* start, const float* g, float grad_output, const uint64_t* items,
                int64_t live) {
  alignas(LINE) static constexpr char zeros[LINE] = {};
  alignas(LINE) char line[LINE];
  const int64_t size = size_of(out.kind), end = out.columns * size;
  int64_t i = 0;
  for (int64_t at = -int64_t(reinterpret_cast<uintptr_t>(start) % LINE); at < end; at += LINE) {
    const int64_t next = i < live ? int64_t(items[i] >> 32) * size : end;
    const bool filled = next < at + LINE && i < live;
    if (filled) std::memset(line, 0, LINE);
    while (i < live && int64_t(items[i] >> 32) * size < at + LINE) {
      const int64_t column = int64_t(items[i] >> 32);
      store(line + (column * size - at), out.kind, next_value(g, grad_output, items, live, i));
    }
    const char* from = filled ? line : zeros;
    if (at >= 0 && at + LINE <= end) {
      stream_line(start + at, from);
    } else {
      const int64_t first = at < 0 ? 0 : at, last = at + LINE < end ? at + LINE : end;
      std::memcpy(start + first, from + (first - at), last - first);
    }
  }
  end_of_stream();
}

// In the order of the slots, which gives the same sums where a column has one slot or the row keeps float32.
void add_to_row(const Scatter& op, int64_t row, float grad_output) {
  const Matrix& out = op.out;
  char* const start = out.at(row);
  const int64_t step = out.column_bytes();
  for (int64_t j = 0; j < op.ids.columns; ++j) {
    const int64_t id = load_integer(op.ids.at(row, j), op.ids.kind);
    if (id < 0 || id >= out.columns) continue;
    char* to = start + id * step;
    const float value = product(*reinterpret_cast<const float*>(op.g.at(row, j)), grad_output);
    store(to, out.kind, out.kind == Kind::float32 ? float(load(to, out.kind)) + value : value);
  }
}

// One row, zeros included; `items` and `spare` hold K each.
void scatter_row(const Scatter& op, int64_t row, bool streamed, uint64_t* items, uint64_t* spare) {
  const Matrix& out = op.out;
  const float* g = reinterpret_cast<const float*>(op.g.at(row));
  const auto scale = float(op.grad_output[row]);
  char* const start = out.at(row);
  const int64_t step = out.column_bytes();
  if (streamed && out.column_stride == 1) {
    return stream_row(out, start, g, scale, items, sorted_slots(op, row, items, spare));
  }
  if (out.column_stride == 1) {
    std::memset(start, 0, out.columns * size_of(out.kind));
  } else {
    for (int64_t column = 0; column < out.columns; ++column) store(start + column * step, out.kind, 0);
  }
  if (op.unique || out.kind == Kind::float32) return add_to_row(op, row, scale);
  const int64_t live = sorted_slots(op, row, items, spare);
  for (int64_t i = 0; i < live;) {
    char* to = start + int64_t(items[i] >> 32) * step;
    store(to, out.kind, next_value(g, scale, items, live, i));
  }
}

}  // namespace

void scatter(const Scatter& op, int threads) {
  const int64_t n = op.ids.rows, k = op.ids.columns;
  std::vector<std::vector<uint64_t>> items(threads, std::vector<uint64_t>(2 * k));
  const bool streamed = n * op.out.columns * size_of(op.out.kind) >= STREAMED_BYTES;
  if (streamed) want_huge_pages(op.out);
  for_each_row(n, threads, grain_of(op.out.columns), [&](int thread, int64_t row) {
    uint64_t* const mine = items[thread].data();
    scatter_row(op, row, streamed, mine, mine + k);
  });
}

}  // namespace topk_rkl
