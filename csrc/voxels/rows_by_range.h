// The rows of a set by the range of cells that they lie in, and answers on their way back to the rows.
//
// Rows in order are where they should be. Others are dealt: chunk by chunk, within a core's cache, every row becomes an
// item of 8 bytes, its cell above its place in the chunk, next to the others of its range. An answer takes the cell's
// place in the item, and goes to its row when a whole chunk is answered: never is anything stored far and wide.
#pragma once

#include "voxels/cells.h"

namespace cvc::voxels {

// Fetches in order what is about to be written in random order: stores that miss would wait for one another. Always
// inline: the compiler drops calls of functions that do nothing but prefetch.
template <class T>
[[gnu::always_inline]] inline void fetch_to_write(T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(to + i, 1);
}

// Whether rows of any integers ascend.
inline bool in_order(const int32_t* coords, int64_t n) {
  const auto pair = [=](int64_t i, int k) {
    const int64_t high = coords[4 * i + k];
    return high * (int64_t{1} << 32) + (static_cast<int64_t>(coords[4 * i + k + 1]) + (int64_t{1} << 31));
  };
  std::atomic<bool> ascending{true};
  for_each_range(n, [&](int64_t begin, int64_t end) {
    if (!ascending.load(std::memory_order_relaxed)) return;
    int64_t descents = 0;
    for (int64_t i = max<int64_t>(begin, 1); i < end; ++i) {
      const int64_t a = pair(i - 1, 0), b = pair(i, 0);
      descents += (b < a) | ((a == b) & (pair(i, 2) < pair(i - 1, 2)));
    }
    if (descents > 0) ascending.store(false, std::memory_order_relaxed);
  });
  return ascending.load();
}

// Rows that need not lie in the box have the answer `absent` there.
template <bool kAllInside>
class RowsByRange {
 public:
  // Short keys, which are a quarter as long, may come with the coordinates.
  RowsByRange(const int32_t* coords, int64_t n, bool ascending, const Box& box, const Ranges& ranges,
              int64_t absent = 0, const uint32_t* short_keys = nullptr)
      : coords_(coords), short_keys_(short_keys), box_(box), ranges_(ranges), absent_(absent), in_place_(ascending) {
    if (in_place_) {
      find_ranges(n);
    } else if (kAllInside && short_keys) {
      deal<uint32_t>(n);
    } else {
      deal<uint64_t>(n);
    }
  }

  // Of rows that are in order.
  int64_t first_row(int64_t range) const { return first_[range]; }

  int64_t size(int64_t range) const
    requires kAllInside
  {
    if (in_place_) return first_[range + 1] - first_[range];
    int64_t sum = 0;
    for (size_t c = 0; c < first_.size(); ++c) sum += ends(c)[range + 1] - ends(c)[range];
    return sum;
  }

  // Calls visit(cell of the range, row) for the rows of a range, in ascending order.
  template <class Visit>
  void operator()(int64_t range, const Visit& visit) const {
    if (in_place_) {
      for_rows<true>(range, visit, [](int64_t) {});
    } else {
      for_items<true>(range, [&](int64_t item, int64_t row) { visit(item >> kRowBits, row); });
    }
  }

  // Calls answer(cell of the range, row), which has at most 47 bits and a sign, for the rows of a range; to be done
  // once. The answers are where `out` points to after deliver.
  template <class T, class Answer>
  void answer(int64_t range, T* out, const Answer& answer) const {
    answer_in_order<true>(range, out, answer);
  }
  // The same in descending order, which takes a little longer: who keeps the last row that came keeps the lowest.
  template <class T, class Answer>
  void answer_backwards(int64_t range, T* out, const Answer& answer) const {
    answer_in_order<false>(range, out, answer);
  }

  template <class T>
  void deliver(T* out) const {
    if (in_place_) return;
    for_each_task(chunks(), [&](int64_t c) {
      T* const to = out + first_[c];
      fetch_to_write(to, size_of_chunk(c));
      for_items_of_chunk(c, [to](int64_t item, int64_t) { to[item & kRowMask] = static_cast<T>(item >> kRowBits); });
    });
  }
  // Adds offsets[range] to the answers; no sum needs more than 32 bits.
  void deliver(int64_t* out, const std::vector<int64_t>& offsets) const
    requires kAllInside
  {
    const auto widen = CVC_ISA_PICK(cell_kernels)()->widen;
    if (in_place_) {
      for_each_task(ranges_.count, [&](int64_t range) {
        for (int64_t i = first_[range], add = offsets[range]; i < first_[range + 1]; ++i) out[i] += add;
      });
      return;
    }
    const auto make = [] { return Buffer<uint32_t>(kRowMask); };
    for_each_task(chunks(), make, [&](int64_t c, const Buffer<uint32_t>& scratch) {
      uint32_t* const to = scratch.data();
      const auto put = [to](int64_t item, int64_t add) {
        to[item & kRowMask] = static_cast<uint32_t>((item >> kRowBits) + add);
      };
      for_items_of_chunk(c, put, offsets.data());
      widen(to, size_of_chunk(c), out + first_[c]);
    });
  }

 private:
  static constexpr int kRowBits = 16;
  static constexpr int64_t kRowMask = (int64_t{1} << kRowBits) - 1;

  const uint32_t* ends(size_t chunk) const { return ends_.data() + chunk * (static_cast<size_t>(ranges_.count) + 2); }

  int64_t chunks() const { return static_cast<int64_t>(first_.size()); }
  int64_t size_of_chunk(int64_t c) const { return ends(c)[ranges_.count + 1]; }

  template <bool ascending, class F>
  static void for_each_between(int64_t begin, int64_t end, const F& f) {
    if constexpr (ascending) {
      for (int64_t i = begin; i < end; ++i) f(i);
    } else {
      for (int64_t i = end; --i >= begin;) f(i);
    }
  }

  template <bool ascending, class Inside, class Outside>
  void for_rows(int64_t range, const Inside& inside, const Outside& outside) const {
    const Box box = box_;  // its members in registers
    for_each_between<ascending>(first_[range], first_[range + 1], [&](int64_t i) {
      if (kAllInside || box.holds(coords_ + 4 * i)) {
        inside(ranges_.within(box.cell(coords_ + 4 * i)), i);
      } else {
        outside(i);
      }
    });
  }

  template <bool ascending, class F>
  void for_items(int64_t range, const F& f) const {
    int64_t* const items = items_.data();
    for_each_between<ascending>(0, chunks(), [&](int64_t c) {
      const int64_t first = first_[c], begin = first + ends(c)[range], end = first + ends(c)[range + 1];
      for_each_between<ascending>(begin, end, [&](int64_t k) { f(items[k], first + (items[k] & kRowMask)); });
    });
  }

  template <bool ascending, class T, class Answer>
  void answer_in_order(int64_t range, T* out, const Answer& answer) const {
    if (in_place_) {
      const auto to_absent = [=, absent = static_cast<T>(absent_)](int64_t row) { out[row] = absent; };
      for_rows<ascending>(
          range, [&](int64_t cell, int64_t row) { out[row] = static_cast<T>(answer(cell, row)); }, to_absent);
    } else {
      for_items<ascending>(range, [&](int64_t& item, int64_t row) {
        item = static_cast<int64_t>(answer(item >> kRowBits, row)) << kRowBits | (item & kRowMask);
      });
    }
  }

  // Calls f(item, offset of its range) for the items of a chunk; those outside the box come last.
  template <class F>
  void for_items_of_chunk(int64_t c, const F& f, const int64_t* offsets = nullptr) const {
    const uint32_t* const end = ends(c) + 1;
    const int64_t* const items = items_.data() + first_[c];
    int64_t k = 0;
    for (int64_t range = 0; range < ranges_.count; ++range)
      for (const int64_t add = offsets ? offsets[range] : 0, last = end[range]; k < last; ++k) f(items[k], add);
    for (const int64_t size = end[ranges_.count]; k < size; ++k) f(items[k] | absent_ << kRowBits, 0);
  }

  // Where the rows of each range begin, when they are in order.
  void find_ranges(int64_t n) {
    first_.assign(ranges_.count + 1, 0);
    first_[ranges_.count] = n;
    for (int64_t r = 1; r < ranges_.count; ++r) {
      int32_t begin[4];
      box_.write(ranges_.first_cell(r), begin);
      int64_t low = first_[r - 1], high = n;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (std::lexicographical_compare(coords_ + 4 * middle, coords_ + 4 * middle + 4, begin, begin + 4)) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      first_[r] = low;
    }
  }

  // By 32-bit cells from short keys, or by 64-bit ones.
  template <class Cell>
  void deal(int64_t n) {
    const Chunks chunks(n, kRowMask / 2 + 1, n);  // of at most kRowMask rows
    const int64_t bins = ranges_.count + 1;       // one for what is outside the box
    items_ = Buffer<int64_t>(n);
    ends_ = Buffer<uint32_t>(chunks.count * (bins + 1));
    first_.resize(chunks.count);
    const auto make = [&] { return std::make_pair(Buffer<Cell>(kRowMask), Buffer<uint32_t>(bins)); };
    for_each_task(chunks.count, make, [&](int64_t c, const auto& scratch) {
      const Ranges ranges = ranges_;
      const int64_t begin = chunks.begin(c), size = chunks.end(c) - begin;
      int64_t* const items = items_.data() + begin;
      Cell* const cells = scratch.first.data();
      uint32_t *const next = scratch.second.data(), *const ends = ends_.data() + c * (bins + 1);
      first_[c] = begin;
      std::fill_n(next, bins, 0);
      fetch_to_write(items, size);
      find_cells(begin, size, cells, next);
      uint32_t sum = 0;
      for (int64_t r = 0; r < bins; ++r) {
        ends[r] = sum;
        sum += std::exchange(next[r], sum);
      }
      ends[bins] = sum;
      for (int64_t i = 0; i < size; ++i) items[next[ranges.of(cells[i])]++] = ranges.within(cells[i]) << kRowBits | i;
    });
  }

  // And how many there are of every range.
  void find_cells(int64_t begin, int64_t size, uint32_t* cells, uint32_t* count) const {
    const Box box = box_;  // its members in registers
    const Ranges ranges = ranges_;
    const uint32_t of_zero = box.cell_of_zero();
    for (int64_t i = 0; i < size; ++i) cells[i] = box.cell(short_keys_[begin + i], of_zero);  // in vectors
    for (int64_t i = 0; i < size; ++i) ++count[ranges.of(cells[i])];
  }
  void find_cells(int64_t begin, int64_t size, uint64_t* cells, uint32_t* count) const {
    const Box box = box_;
    const Ranges ranges = ranges_;
    const int32_t* const coords = coords_ + 4 * begin;
    const uint64_t outside = ranges.first_cell(ranges.count);
    for (int64_t i = 0; i < size; ++i) {
      uint64_t cell = box.cell(coords + 4 * i);
      if constexpr (!kAllInside) cell = outside ^ ((outside ^ cell) & -uint64_t{box.holds(coords + 4 * i)});
      cells[i] = cell;
      ++count[ranges.of(cell)];
    }
  }

  const int32_t* coords_;
  const uint32_t* short_keys_;
  const Box& box_;
  const Ranges& ranges_;
  int64_t absent_;
  bool in_place_;
  std::vector<int64_t> first_;  // the first row of every range, or of every chunk
  // Of every chunk: its items, and where those of each range begin, those outside the box begin, and the last end.
  Buffer<int64_t> items_;
  Buffer<uint32_t> ends_;
};

}  // namespace cvc::voxels
