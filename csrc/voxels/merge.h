// Walks over sorted tables of voxels. Every walk is made twice over the same chunks: to count, then to write each
// output once, at its final place. Chunks begin where a key begins in both tables, so that equal keys meet in one
// chunk.
#pragma once

#include "voxels/table.h"

namespace cvc::voxels {

constexpr uint64_t kNoKey = ~uint64_t{0};  // keys have at most 63 bits

// The first place in [begin, end) whose key is not less, by steps that double: cheap when it is near.
template <class Table>
int64_t gallop(const Table& table, uint64_t key, int64_t begin, int64_t end) {
  int64_t step = 1;
  while (begin + step < end && table.key(begin + step) < key) begin += step, step *= 2;
  return lower_bound(table, key, begin, min(begin + step, end));
}

// Calls visit(key, i, j) for every distinct key of a: i is its lowest row, j that in b or -1.
template <class Table, class Visit>
void walk_first(const Table& a, const Table& b, int64_t i, int64_t i_end, int64_t j, int64_t j_end,
                const Visit& visit) {
  const bool far_apart = (j_end - j) / 16 > i_end - i;
  uint64_t before = kNoKey;
  while (i < i_end) {
    const uint64_t key = a.key(i);
    if (far_apart) {
      j = gallop(b, key, j, j_end);
    } else {
      while (j < j_end && b.key(j) < key) ++j;
    }
    if (key != before) visit(key, i, j < j_end && b.key(j) == key ? j : int64_t{-1});
    before = key;
    ++i;
  }
}

// Where the chunks of one or two tables begin.
template <class Table>
std::vector<int64_t> cut(const Table& table) {
  const Chunks chunks(table.size);
  std::vector<int64_t> begin(chunks.count + 1, 0);
  for (int64_t c = 1; c < chunks.count; ++c) {
    const int64_t i = chunks.begin(c);
    begin[c] = lower_bound(table, table.key(i - 1), i, table.size, /*above=*/true);
  }
  begin[chunks.count] = table.size;
  return begin;
}

struct Cut {
  int64_t i, j;
};

template <class Table>
std::vector<Cut> cut(const Table& a, const Table& b) {
  const Chunks chunks(a.size + b.size);
  std::vector<Cut> begin(chunks.count + 1, Cut{0, 0});
  for (int64_t c = 1; c < chunks.count; ++c) {
    const int64_t rows = chunks.begin(c);  // that a merge has taken by then: i of a, rows - i of b
    int64_t low = max<int64_t>(0, rows - b.size), high = min(rows, a.size);
    while (low < high) {
      const int64_t i = low + (high - low) / 2;
      if (a.key(i) < b.key(rows - i - 1)) {
        low = i + 1;
      } else {
        high = i;
      }
    }
    const uint64_t key_a = low < a.size ? a.key(low) : kNoKey, key_b = rows - low < b.size ? b.key(rows - low) : kNoKey;
    const uint64_t key = min(key_a, key_b);
    begin[c] = {lower_bound(a, key, 0, a.size), lower_bound(b, key, 0, b.size)};
  }
  begin[chunks.count] = {a.size, b.size};
  return begin;
}

// Counts what every chunk has to write, lets alloc(total) make room, then calls write(chunk, begin, end) with its
// place.
template <class Count, class Alloc, class Write>
void count_then_write(int64_t chunks, const Count& count, const Alloc& alloc, const Write& write) {
  std::vector<int64_t> begin(chunks + 1, 0);
  for_each_task(chunks, [&](int64_t c) { begin[c] = count(c); });
  alloc(running_sums(begin));
  for_each_task(chunks, [&](int64_t c) { write(c, begin[c], begin[c + 1]); });
}

}  // namespace cvc::voxels
