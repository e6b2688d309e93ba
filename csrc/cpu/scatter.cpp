// The dense gradient: zeros and values in one pass over the row.
#include <bit>
#include <cstring>

#include "cpu.hpp"
#include "stream.hpp"

namespace topk_rkl {
namespace {

// The live slots as (column, slot), by column and then slot; empty ones are left out.
int64_t sorted_slots(const Matrix& ids, int64_t row, int64_t k, int64_t columns, uint64_t* items, uint64_t* spare) {
  int64_t live = 0;
  for (int64_t j = 0; j < k; ++j) {
    const int64_t id = load_integer(ids.at(row, j), ids.kind);
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
void add_to_row(const Matrix& g, const Matrix& ids, float grad_output, const Matrix& out, int64_t row, int64_t k) {
  char* const start = out.at(row);
  const int64_t step = out.step * size_of(out.kind);
  for (int64_t j = 0; j < k; ++j) {
    const int64_t id = load_integer(ids.at(row, j), ids.kind);
    if (id < 0 || id >= out.columns) continue;
    char* to = start + id * step;
    const float value = product(*reinterpret_cast<const float*>(g.at(row, j)), grad_output);
    store(to, out.kind, out.kind == Kind::float32 ? float(load(to, out.kind)) + value : value);
  }
}

}  // namespace

void scatter_row(const Matrix& g, const Matrix& ids, double grad_output, const Matrix& out, int64_t row, int64_t k,
                 bool unique, bool streamed, uint64_t* items, uint64_t* spare) {
  const float* slots = reinterpret_cast<const float*>(g.at(row));
  const auto scale = float(grad_output);
  char* const start = out.at(row);
  const int64_t step = out.step * size_of(out.kind);
  if (streamed && out.step == 1) {
    const int64_t live = sorted_slots(ids, row, k, out.columns, items, spare);
    return stream_row(out, start, slots, scale, items, live);
  }
  if (out.step == 1) {
    std::memset(start, 0, out.columns * size_of(out.kind));
  } else {
    for (int64_t column = 0; column < out.columns; ++column) store(start + column * step, out.kind, 0);
  }
  if (unique || out.kind == Kind::float32) return add_to_row(g, ids, scale, out, row, k);
  const int64_t live = sorted_slots(ids, row, k, out.columns, items, spare);
  for (int64_t i = 0; i < live;) {
    char* to = start + int64_t(items[i] >> 32) * step;
    store(to, out.kind, next_value(slots, scale, items, live, i));
  }
}

}  // namespace topk_rkl
