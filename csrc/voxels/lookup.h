// Look-ups in a sorted table of voxels. Queries that come in order, chunk by chunk, are merged with the table; others
// go through a directory of where keys with the same leading bits begin.
#pragma once

#include "voxels/merge.h"

namespace cvc::voxels {

// Where the keys of a table begin that share their leading bits: about one voxel each, if they were even.
template <class Table>
class Directory {
 public:
  Directory(const Table& table, const Layout& layout) : table_(table), layout_(layout) {
    const bool small = table.size < (int64_t{1} << 32);
    const int bits = small ? min(layout.bits, detail::bit_length(static_cast<uint64_t>(table.size))) : 0;
    shift_ = layout.bits - bits;
    const int64_t bins = int64_t{1} << bits;
    begin_ = Buffer<uint32_t>(bins + 1);
    // Row i fills in the bins after that of the row before it, up to its own.
    for_each_range(table.size + 1, [&](int64_t from, int64_t to) {
      int64_t bin = from > 0 ? bin_of(from - 1) + 1 : 0;
      for (int64_t i = from; i < to; ++i)
        for (const int64_t own = i < table.size ? bin_of(i) : bins; bin <= own; ++bin)
          begin_[bin] = static_cast<uint32_t>(i);
    });
  }

  [[gnu::always_inline]] void prefetch_bin(uint64_t narrow) const {
    __builtin_prefetch(begin_.data() + (narrow >> shift_));
  }
  [[gnu::always_inline]] void prefetch_rows(uint64_t narrow) const { table_.prefetch(begin_[narrow >> shift_]); }

  // The place of a key, given narrow and as the table has it, or -1.
  int64_t find(uint64_t narrow, uint64_t key) const {
    const uint64_t bin = narrow >> shift_;
    int64_t low = begin_[bin], high = begin_[bin + 1];
    if (table_.size >= (int64_t{1} << 32)) low = 0, high = table_.size;
    // The number of steps depends on the size alone, and no step branches. Of equal keys this finds the lowest row.
    int64_t size = high - low;
    while (size > 1) {
      const int64_t half = size / 2;
      low += table_.key(low + half - 1) < key ? half : 0;
      size -= half;
    }
    return size == 1 && table_.key(low) == key ? low : -1;
  }

 private:
  int64_t bin_of(int64_t i) const {
    return static_cast<int64_t>((std::is_same_v<Table, Plain> ? layout_.narrow(table_.key(i)) : table_.key(i)) >>
                                shift_);
  }

  const Table& table_;
  const Layout& layout_;
  int shift_ = 0;
  Buffer<uint32_t> begin_;
};

// Queries as keys of the table, block by block.
template <class Table>
class Queries {
 public:
  static constexpr int64_t kBlock = 256;
  static constexpr bool kPlain = std::is_same_v<Table, Plain>;

  Queries(const Scan& box, const Layout& layout, const int32_t* coords) : layout_(layout), coords_(coords) {
    write_voxel(box.lowest, lowest_);
    write_voxel(box.highest - box.lowest, extent_);
  }

  // Reads queries [begin, begin + count); returns whether those in the table's box are in order.
  bool read(int64_t begin, int64_t count) {
    typedef uint32_t Row __attribute__((vector_size(16)));
    Row lowest, extent;
    std::memcpy(&lowest, lowest_, sizeof lowest);
    std::memcpy(&extent, extent_, sizeof extent);
    uint64_t before = 0;
    bool ascending = true;
    for (int64_t k = 0; k < count; ++k) {
      Row row;
      std::memcpy(&row, coords_ + 4 * (begin + k), sizeof row);
      row -= lowest;
      const auto beyond = row > extent;
      uint64_t any[2];
      std::memcpy(any, &beyond, sizeof any);
      inside[k] = (any[0] | any[1]) == 0;
      uint64_t pair[2];  // (batch, x), (y, z)
      std::memcpy(pair, &row, sizeof pair);
      const uint64_t outer = (pair[0] & 0xFFFFFFFF) << layout_.batch | pair[0] >> 32 << layout_.x;
      const uint64_t inner = (pair[1] & 0xFFFFFFFF) << layout_.y | pair[1] >> 32;
      narrow[k] = inside[k] ? outer | inner : before;
      if (kPlain) key[k] = inside[k] ? key_of(coords_ + 4 * (begin + k)) : k > 0 ? key[k - 1] : 0;
      ascending &= narrow[k] >= before;
      before = narrow[k];
    }
    return ascending;
  }

  uint64_t key_in_table(int64_t k) const { return kPlain ? key[k] : narrow[k]; }

  uint64_t narrow[kBlock], key[kPlain ? kBlock : 1];
  bool inside[kBlock];

 private:
  const Layout& layout_;
  const int32_t* coords_;
  alignas(16) int32_t lowest_[4], extent_[4];
};

// Calls answer(i, place) for every query i in [0, n) with its place in the table, or -1.
template <class Table, class Answer>
void look_up(const Table& table, const Scan& box, const int32_t* coords, int64_t n, const Answer& answer) {
  if (table.size == 0) {
    for_each_range(n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) answer(i, int64_t{-1});
    });
    return;
  }
  using Q = Queries<Table>;
  const Layout layout(box);

  const Chunks chunks(n, 1 << 13, 1 << 10);
  std::vector<uint8_t> done(chunks.count, 0);
  for_each_task(chunks.count, [&](int64_t c) {
    Q queries(box, layout, coords);
    int64_t place = -1;
    uint64_t last = 0;
    for (int64_t i = chunks.begin(c); i < chunks.end(c); i += Q::kBlock) {
      const int64_t count = min(Q::kBlock, chunks.end(c) - i);
      if (!queries.read(i, count) || queries.narrow[0] < last) return;
      last = queries.narrow[count - 1];
      const int64_t begin = place < 0 ? 0 : place;
      const int64_t from = gallop(table, queries.key_in_table(0), begin, table.size);
      const int64_t to = gallop(table, queries.key_in_table(count - 1), from, table.size);
      if (to - from > 16 * count) return;
      int64_t k = 0;
      for (place = from; k < count && place < table.size;) {
        const uint64_t there = table.key(place), wanted = queries.key_in_table(k);
        answer(i + k, there == wanted && queries.inside[k] ? place : int64_t{-1});
        k += there >= wanted;
        place += there < wanted;
      }
      for (; k < count; ++k) answer(i + k, int64_t{-1});
    }
    done[c] = 1;
  });
  if (std::all_of(done.begin(), done.end(), [](uint8_t d) { return d == 1; })) return;

  const Directory<Table> directory(table, layout);
  for_each_task(chunks.count, [&](int64_t c) {
    if (done[c]) return;
    Q queries(box, layout, coords);
    for (int64_t i = chunks.begin(c); i < chunks.end(c); i += Q::kBlock) {
      const int64_t count = min(Q::kBlock, chunks.end(c) - i);
      queries.read(i, count);
      for (int64_t k = 0; k < count; ++k) directory.prefetch_bin(queries.narrow[k]);
      for (int64_t k = 0; k < count; ++k) directory.prefetch_rows(queries.narrow[k]);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t found = directory.find(queries.narrow[k], queries.key_in_table(k));
        answer(i + k, queries.inside[k] ? found : int64_t{-1});
      }
    }
  });
}

}  // namespace cvc::voxels
