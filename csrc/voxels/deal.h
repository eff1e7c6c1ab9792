// Deals what is to be added to rows out to tasks that own ranges of rows: each task gets its items in their order, so
// that sums depend neither on the threads nor on atomics.
#pragma once

#include "voxels/tasks.h"

namespace cvc::voxels {

// Ranges of 2^shift rows, at least `grain` and at most 256 of them.
struct Parts {
  Parts(int64_t rows, int64_t grain) : rows(rows) {
    while (int64_t{1} << shift < grain || (rows - 1) >> shift >= 256) ++shift;
    count = rows > 0 ? ((rows - 1) >> shift) + 1 : 0;
  }
  int64_t of(int64_t row) const { return row >> shift; }
  int64_t begin(int64_t part) const { return std::min(part << shift, rows); }
  int64_t end(int64_t part) const { return begin(part + 1); }

  int64_t rows, count;
  int shift = 0;
};

template <class Item>
struct Dealt {
  Buffer<Item> items;
  std::vector<int64_t> first;  // [parts + 1]: where the items of each part begin
};

// `rows`(begin, end, see) calls see(row) for the row of every item that [begin, end) of n gives, negative for none;
// `items`(begin, end, give) then calls give(row, item) for the same ones in the same order.
template <class Item, class Rows, class Items>
Dealt<Item> deal_out(int64_t n, const Parts& parts, const Rows& rows, const Items& items) {
  const Chunks chunks(n);
  Dealt<Item> dealt{{}, std::vector<int64_t>(parts.count + 1, 0)};
  std::vector<int64_t> place(parts.count * chunks.count, 0);  // of every part, chunk by chunk
  for_each_task(chunks.count, [&](int64_t c) {
    std::vector<int64_t> count(parts.count, 0);
    rows(chunks.begin(c), chunks.end(c), [&](int64_t row) {
      if (row >= 0) ++count[parts.of(row)];
    });
    for (int64_t p = 0; p < parts.count; ++p) place[p * chunks.count + c] = count[p];
  });
  dealt.first[parts.count] = running_sums(place);
  dealt.items = Buffer<Item>(dealt.first[parts.count]);
  if (chunks.count == 0) return dealt;
  for (int64_t p = 0; p < parts.count; ++p) dealt.first[p] = place[p * chunks.count];
  for_each_task(chunks.count, [&](int64_t c) {
    std::vector<int64_t> next(parts.count);
    for (int64_t p = 0; p < parts.count; ++p) next[p] = place[p * chunks.count + c];
    items(chunks.begin(c), chunks.end(c), [&](int64_t row, const Item& item) {
      if (row >= 0) dealt.items[next[parts.of(row)]++] = item;
    });
  });
  return dealt;
}

}  // namespace cvc::voxels
