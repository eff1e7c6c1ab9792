// Sorted tables of voxels: key(i) ascending, row(i) where the voxel was given, equal keys by ascending row.
#pragma once

#include "voxels/radix.h"
#include "voxels/scan.h"

namespace cvc::voxels {

// Keys within a box, without the bits that the box does not need.
struct Layout {
  explicit Layout(const Scan& box) : base(box.lowest <= box.highest ? box.lowest : 0) {
    const uint64_t extent = box.lowest <= box.highest ? box.highest - base : 0;
    y = detail::bit_length(extent & 0xFFFF);
    x = y + detail::bit_length(extent >> 16 & 0xFFFF);
    batch = x + detail::bit_length(extent >> 32 & 0xFFFF);
    bits = batch + detail::bit_length(extent >> 48);
  }
  // No field of a key in the box is less than that of the base: the difference borrows nothing.
  uint64_t narrow(uint64_t key) const {
    key -= base;
    return (key >> 48 << batch) | (key >> 32 & 0xFFFF) << x | (key >> 16 & 0xFFFF) << y | (key & 0xFFFF);
  }
  uint64_t widen(uint64_t narrow) const {
    const auto field = [=](int from, int to) { return narrow >> from & ((uint64_t{1} << (to - from)) - 1); };
    return base + (narrow >> batch << 48 | field(x, batch) << 32 | field(y, x) << 16 | field(0, y));
  }

  uint64_t base;
  int y, x, batch, bits;  // where the fields start (z at 0), and the end
};

// Keys of another kind, of so many bits: as they are.
struct Whole {
  int bits;
  uint64_t narrow(uint64_t key) const { return key; }
  uint64_t widen(uint64_t key) const { return key; }
};

// Voxels that came in order. Prefetches are always inline: the compiler drops calls of functions that do nothing else.
struct Plain {
  const uint64_t* keys;
  int64_t size;
  uint64_t key(int64_t i) const { return keys[i]; }
  int64_t row(int64_t i) const { return i; }
  [[gnu::always_inline]] void prefetch(int64_t i) const { __builtin_prefetch(keys + i); }
  uint64_t widen(uint64_t key) const { return key; }
};

// Voxels that were sorted.
template <class Item, class Layout>
struct Sorted {
  const Item* items;
  int64_t size;
  int row_bits;
  Layout layout;
  uint64_t key(int64_t i) const { return key_in(items[i], row_bits); }
  int64_t row(int64_t i) const { return static_cast<int64_t>(row_in(items[i], row_bits)); }
  [[gnu::always_inline]] void prefetch(int64_t i) const { __builtin_prefetch(items + i); }
  uint64_t widen(uint64_t key) const { return layout.widen(key); }
};

// The first place of a table in [begin, end) whose key is not less (`above`: is greater) than the given one.
template <class Table>
int64_t lower_bound(const Table& table, uint64_t key, int64_t begin, int64_t end, bool above = false) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    const uint64_t there = table.key(middle);
    if (there < key || (above && there == key)) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

template <class Table>
bool has_duplicates(const Table& table) {
  std::atomic<bool> found{false};
  for_each_range(table.size, [&](int64_t begin, int64_t end) {
    int64_t equal = 0;
    for (int64_t i = max<int64_t>(begin, 1); i < end; ++i) equal += table.key(i) == table.key(i - 1);
    if (equal > 0) found.store(true, std::memory_order_relaxed);
  });
  return found.load();
}

// Whether rows [begin, begin + size) of a table are in order already.
struct Part {
  int64_t begin, size;
  bool ascending;
};

// Calls f(table, …) with a sorted table for every part of the given keys, all of one type. The keys serve as scratch.
template <class Layout, class F>
auto with_tables(Buffer<uint64_t>& keys, const Layout& layout, std::initializer_list<Part> parts, const F& f) {
  const auto call = [&](const auto& make) {
    const Part* const part = parts.begin();
    if constexpr (requires { f(make(part[0]), make(part[0])); }) {
      return f(make(part[0]), make(part[1]));
    } else {
      return f(make(part[0]));
    }
  };
  bool ascending = true;
  int64_t longest = 0;
  for (const Part& part : parts) ascending &= part.ascending, longest = max(longest, part.size);
  if (ascending) return call([&](const Part& p) { return Plain{keys.data() + p.begin, p.size}; });

  const int row_bits = detail::bit_length(static_cast<uint64_t>(max<int64_t>(longest - 1, 0)));
  const auto sort = [&](auto* items, auto* scratch, const auto& make) {
    for (const Part& p : parts) {
      const uint64_t* const in = keys.data() + p.begin;
      const auto load = [=](int64_t i) { return make(layout.narrow(in[i]), static_cast<uint64_t>(i)); };
      if (p.ascending) {
        for_each_range(p.size, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) items[p.begin + i] = load(i);
        });
      } else {
        detail::sort_range(load, items + p.begin, scratch + p.begin, p.size, row_bits, layout.bits, true);
      }
    }
    return call([&](const Part& p) {
      return Sorted<std::remove_pointer_t<decltype(items)>, Layout>{items + p.begin, p.size, row_bits, layout};
    });
  };
  if (layout.bits + row_bits <= 64) {
    Buffer<uint64_t> items(keys.size());
    return sort(items.data(), keys.data(), [=](uint64_t key, uint64_t row) { return key << row_bits | row; });
  }
  Buffer<Wide> items(keys.size()), scratch(keys.size());
  return sort(items.data(), scratch.data(), [](uint64_t key, uint64_t row) { return Wide{key, row}; });
}

}  // namespace cvc::voxels
