// Sets of voxels as bits of the box that they fill, where that is not much larger than they are: a bit tells whether a
// voxel is there, and counting bits its place among all in lexicographic order, so that nothing is sorted.
//
// The cells of the box are cut into ranges whose bits fit a core's cache. Rows out of order are first dealt to ranges,
// 8 bytes each, chunk by chunk within the cache. Then each range is worked on by one thread.
#pragma once

#include "voxels/radix.h"
#include "voxels/scan.h"

namespace cvc::voxels {

// How many words of bits there may be for every row, lest the empty space costs more than a sort; 0: none (tests).
inline std::atomic<int64_t> words_per_row{8};

// The cells of a box in lexicographic order; lines along z begin at a word of 64.
class Box {
 public:
  static constexpr uint64_t kMostCells = uint64_t{1} << 46;

  explicit Box(const Scan& scan) {
    for (int k = 0; k < 4; ++k) {
      const int shift = 48 - 16 * k;
      low_[k] = static_cast<int32_t>(scan.lowest >> shift & 0xFFFF);
      extent_[k] = static_cast<uint32_t>((scan.highest >> shift & 0xFFFF) - (scan.lowest >> shift & 0xFFFF));
    }
    stride_[2] = (extent_[3] / 64 + 1) * uint64_t{64};
    stride_[1] = stride_[2] * (extent_[2] + 1);
    stride_[0] = stride_[1] * (extent_[1] + 1);
    cells_ = stride_[0] * (extent_[0] + 1);
    const uint64_t length[3] = {uint64_t{extent_[1]} + 1, uint64_t{extent_[2]} + 1, stride_[2]};
    for (int k = 0; k < 3; ++k) {
      length_[k] = length[k];
      inverse_[k] = ~uint64_t{0} / length[k] + 1;
    }
  }

  uint64_t cells() const { return cells_; }

  // Whether bits pay for so many rows, and a cell and a row fit 64 bits.
  bool suits(int64_t rows) const {
    const uint64_t most = words_per_row.load(std::memory_order_relaxed) * static_cast<uint64_t>(rows + 64);
    return rows > 0 && cells_ / 64 <= most && cells_ <= kMostCells && rows < int64_t{1} << 32 &&
           detail::bit_length(cells_) + detail::bit_length(static_cast<uint64_t>(rows)) <= 64;
  }

  bool holds(const int32_t* c) const {
    bool inside = true;
    for (int k = 0; k < 4; ++k) inside &= static_cast<uint32_t>(c[k]) - static_cast<uint32_t>(low_[k]) <= extent_[k];
    return inside;
  }

  uint64_t cell(const int32_t* c) const {
    return at(c, 0) * stride_[0] + at(c, 1) * stride_[1] + at(c, 2) * stride_[2] + at(c, 3);
  }

  void write(uint64_t cell, int32_t* c) const {
    for (int k = 2; k >= 0; --k) {
      // Exact, as cell · length < 2^64.
      const uint64_t quotient = static_cast<uint64_t>(static_cast<unsigned __int128>(cell) * inverse_[k] >> 64);
      c[k + 1] = static_cast<int32_t>(cell - quotient * length_[k]) + low_[k + 1];
      cell = quotient;
    }
    c[0] = static_cast<int32_t>(cell) + low_[0];
  }

 private:
  uint64_t at(const int32_t* c, int k) const { return static_cast<uint32_t>(c[k] - low_[k]); }

  int32_t low_[4];
  uint32_t extent_[4];
  uint64_t stride_[3], length_[3], inverse_[3], cells_;
};

// Equal parts of a box, of 2^shift words each.
struct Ranges {
  // One for few rows: to wake another thread would take longer than to do without.
  Ranges(const Box& box, int64_t rows) {
    const uint64_t words = box.cells() / 64, wanted = max<uint64_t>(rows >> 11, words >> 15);
    const uint64_t most = rows < kFewRows ? 1 : std::clamp<uint64_t>(wanted, 1, 2048);
    while ((words - 1) >> shift >= most) ++shift;
    count = static_cast<int64_t>((words - 1) >> shift) + 1;
  }
  int64_t of(uint64_t cell) const { return static_cast<int64_t>(cell >> (shift + 6)); }
  uint64_t first_cell(int64_t range) const { return static_cast<uint64_t>(range) << (shift + 6); }

  static constexpr int64_t kFewRows = 1 << 15;

  int shift = 0;
  int64_t count;
};

// The bits of one range at a time.
class Bits {
 public:
  explicit Bits(const Ranges& ranges)
      : ranges_(ranges), size_(int64_t{1} << ranges.shift), words_(size_), before_(size_) {}

  void start(int64_t range) {
    std::fill_n(words_.data(), size_, 0);
    first_ = ranges_.first_cell(range);
  }
  void set(uint64_t cell) const { words_[word(cell)] |= bit(cell); }
  bool has(uint64_t cell) const { return (words_[word(cell)] & bit(cell)) != 0; }
  int64_t count() const {
    int64_t sum = 0;
    for (int64_t w = 0; w < size_; ++w) sum += __builtin_popcountll(words_[w]);
    return sum;
  }
  // To be called before rank; returns the count.
  int64_t number() const {
    uint32_t sum = 0;
    for (int64_t w = 0; w < size_; ++w) {
      before_[w] = sum;
      sum += static_cast<uint32_t>(__builtin_popcountll(words_[w]));
    }
    return sum;
  }
  // How many bits of the range come before the cell's.
  int64_t rank(uint64_t cell) const {
    return before_[word(cell)] + __builtin_popcountll(words_[word(cell)] & (bit(cell) - 1));
  }

 private:
  int64_t word(uint64_t cell) const { return static_cast<int64_t>((cell - first_) >> 6); }
  static uint64_t bit(uint64_t cell) { return uint64_t{1} << (cell & 63); }

  Ranges ranges_;
  int64_t size_;
  uint64_t first_ = 0;
  Buffer<uint64_t> words_;
  Buffer<uint32_t> before_;
};

// Whether rows of any integers ascend.
inline bool in_order(const int32_t* coords, int64_t n) {
  const auto pair = [=](int64_t i, int k) {
    const int64_t high = coords[4 * i + k];
    return high * (int64_t{1} << 32) + (static_cast<int64_t>(coords[4 * i + k + 1]) + (int64_t{1} << 31));
  };
  std::atomic<bool> ascending{true};
  for_each_range(n, [&](int64_t begin, int64_t end) {
    int64_t descents = 0;
    for (int64_t i = max<int64_t>(begin, 1); i < end; ++i) {
      const int64_t a = pair(i - 1, 0), b = pair(i, 0);
      descents += (b < a) | ((a == b) & (pair(i, 2) < pair(i - 1, 2)));
    }
    if (descents > 0) ascending.store(false, std::memory_order_relaxed);
  });
  return ascending.load();
}

// For rows that all lie in the box.
struct NoneOutside {
  void operator()(int64_t) const {}
};

// Rows by the range that they lie in. Calls outside(row) once, now or later, for those that do not lie in the box.
template <class Outside = NoneOutside>
class RowsByRange {
 public:
  RowsByRange(const int32_t* coords, int64_t n, bool ascending, const Box& box, const Ranges& ranges,
              const Outside& outside = {})
      : coords_(coords), box_(box), ranges_(ranges), outside_(outside), in_place_(ascending || ranges.count == 1) {
    if (in_place_) {
      find_ranges(n);
    } else {
      deal(n);
    }
  }

  // Of rows that are in order.
  int64_t first_row(int64_t range) const { return first_[range]; }

  // Calls visit(cell, row) for the rows of a range, the lowest last: what is written last is what it wrote.
  template <class Visit>
  void operator()(int64_t range, const Visit& visit) const {
    const Box box = box_;  // its members in registers
    if (in_place_) {
      for (int64_t i = first_[range + 1]; i-- > first_[range];)
        if (is_inside(box, i)) {
          visit(box.cell(coords_ + 4 * i), i);
        } else {
          outside_(i);
        }
      return;
    }
    const int64_t chunks = static_cast<int64_t>(first_.size());
    const uint64_t mask = (uint64_t{1} << row_bits_) - 1;
    for (int64_t c = chunks; c-- > 0;) {
      const uint32_t* const end = ends_.data() + c * (ranges_.count + 1) + range;
      const uint64_t* const items = items_.data() + first_[c];
      for (int64_t k = end[1]; k-- > end[0];) visit(items[k] >> row_bits_, static_cast<int64_t>(items[k] & mask));
    }
  }

 private:
  bool is_inside(const Box& box, int64_t i) const {
    return std::is_same_v<Outside, NoneOutside> || box.holds(coords_ + 4 * i);
  }

  // Where the rows of each range begin, when they are in order or all in one.
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

  void deal(int64_t n) {
    const Chunks chunks(n, 1 << 15, int64_t{1} << 20);
    const int64_t ranges = ranges_.count;
    row_bits_ = detail::bit_length(static_cast<uint64_t>(n));
    items_ = Buffer<uint64_t>(n);
    ends_ = Buffer<uint32_t>(chunks.count * (ranges + 1));
    first_.resize(chunks.count);
    for_each_task(
        chunks.count, [&] { return Buffer<uint32_t>(ranges); },
        [&](int64_t c, const Buffer<uint32_t>& place) {
          const Box box = box_;
          const int64_t begin = chunks.begin(c), end = chunks.end(c);
          uint64_t* const items = items_.data() + begin;
          uint32_t *const next = place.data(), *const ends = ends_.data() + c * (ranges + 1);
          const int row_bits = row_bits_, shift = ranges_.shift + 6;
          first_[c] = begin;
          std::fill_n(next, ranges, 0);
          for (int64_t i = begin; i < end; ++i)
            if (is_inside(box, i)) ++next[box.cell(coords_ + 4 * i) >> shift];
          uint32_t sum = 0;
          for (int64_t r = 0; r < ranges; ++r) {
            ends[r] = sum;
            sum += std::exchange(next[r], sum);
          }
          ends[ranges] = sum;
          for (int64_t i = begin; i < end; ++i) {
            if (!is_inside(box, i)) {
              outside_(i);
              continue;
            }
            const uint64_t cell = box.cell(coords_ + 4 * i);
            items[next[cell >> shift]++] = cell << row_bits | static_cast<uint64_t>(i);
          }
        });
  }

  const int32_t* coords_;
  const Box& box_;
  const Ranges& ranges_;
  const Outside outside_;
  bool in_place_;
  std::vector<int64_t> first_;  // the first row of every range, or of every chunk
  // Dealt rows: chunk by chunk, range by range, cell and row in one.
  Buffer<uint64_t> items_;
  Buffer<uint32_t> ends_;
  int row_bits_ = 0;
};

}  // namespace cvc::voxels
