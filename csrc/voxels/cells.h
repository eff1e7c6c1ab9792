// Sets of voxels as bits of the box that they fill, where that is not much larger than they are: a bit tells whether a
// voxel is there, and counting bits its place among all in lexicographic order, so that nothing is sorted. The cells of
// the box are cut into ranges whose bits fit a core's first cache; each range is worked on by one thread.
#pragma once

#include "voxels/cell_kernels.h"
#include "voxels/radix.h"
#include "voxels/scan.h"

namespace cvc::voxels {

// How many words of bits there may be for every row, lest the empty space costs more than a sort; 0: none (tests).
inline std::atomic<int64_t> words_per_row{8};

// The cells of a box in lexicographic order; lines along z begin at a word of 64.
class Box {
 public:
  static constexpr uint64_t kMostCells = uint64_t{1} << 42;  // so that 32 bits tell the cells of a range apart

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
      inverse_[k] = ((uint64_t{1} << 63) - 1) / length[k] + 1;
    }
  }

  uint64_t cells() const { return cells_; }

  // Whether bits pay for so many rows.
  bool suits(int64_t rows) const {
    const uint64_t most = words_per_row.load(std::memory_order_relaxed) * static_cast<uint64_t>(rows + 64);
    return rows > 0 && cells_ / 64 <= most && cells_ <= kMostCells && rows < int64_t{1} << 32;
  }

  bool holds(const int32_t* c) const {
    bool inside = true;
    for (int k = 0; k < 4; ++k) inside &= static_cast<uint32_t>(c[k]) - static_cast<uint32_t>(low_[k]) <= extent_[k];
    return inside;
  }

  uint64_t cell(const int32_t* c) const {
    return at(c, 0) * stride_[0] + at(c, 1) * stride_[1] + at(c, 2) * stride_[2] + at(c, 3);
  }

  // The same of a short key (voxels/keys.h), given cell_of_zero().
  uint32_t cell(uint32_t short_key, uint32_t of_zero) const {
    const auto field = [=](int k) { return short_key >> (kShortBits * (3 - k)) & ((1 << kShortBits) - 1); };
    const auto stride = [this](int k) { return static_cast<uint32_t>(stride_[k]); };
    return of_zero + field(0) * stride(0) + field(1) * stride(1) + field(2) * stride(2) + field(3);
  }
  // The cell that the voxel of zeros would have, modulo 2^32.
  uint32_t cell_of_zero() const {
    const int32_t zero[4] = {};
    return static_cast<uint32_t>(at(zero, 0) * stride_[0] + at(zero, 1) * stride_[1] + at(zero, 2) * stride_[2]) +
           static_cast<uint32_t>(at(zero, 3));
  }

  void write(uint64_t cell, int32_t* c) const {
    c[3] = static_cast<int32_t>(split(cell, 2)) + low_[3];
    c[2] = static_cast<int32_t>(split(cell, 1)) + low_[2];
    c[1] = static_cast<int32_t>(extent_[0] == 0 ? std::exchange(cell, 0) : split(cell, 0)) + low_[1];
    c[0] = static_cast<int32_t>(cell) + low_[0];
  }

  // Writes the voxels of n cells that count from `first` on.
  void write(uint64_t first, const uint32_t* cells, int64_t n, int32_t* coords) const {
    if (cells_ < uint64_t{1} << 31) {
      NarrowBox narrow{{low_[0], low_[1], low_[2], low_[3]}, 0, 0, 0};
      narrow.line = static_cast<int32_t>(stride_[2]);
      narrow.plane = static_cast<int32_t>(stride_[1]);
      narrow.batch = static_cast<int32_t>(stride_[0]);
      CVC_ISA_PICK(cell_kernels)()->voxels_of(narrow, static_cast<int32_t>(first), cells, n, coords);
    } else {
      const Box local = *this;  // its members in registers
      for (int64_t k = 0; k < n; ++k) local.write(first + cells[k], coords + 4 * k);
    }
  }

 private:
  // Divides a cell by a length; returns the remainder. Exact, as cell · length < 2^63.
  uint64_t split(uint64_t& cell, int k) const {
    const uint64_t all = cell;
    cell = static_cast<uint64_t>(static_cast<unsigned __int128>(2 * cell) * inverse_[k] >> 64);
    return all - cell * length_[k];
  }
  uint64_t at(const int32_t* c, int k) const { return static_cast<uint32_t>(c[k] - low_[k]); }

  int32_t low_[4];
  uint32_t extent_[4];
  uint64_t stride_[3], length_[3], inverse_[3], cells_;
};

// Equal parts of a box, of 2^shift words each.
struct Ranges {
  // One for few rows: to wake another thread would take longer than to do without.
  Ranges(const Box& box, int64_t rows) {
    const uint64_t words = box.cells() / 64, wanted = max<uint64_t>(rows >> 11, words >> 11);
    const uint64_t most = rows < kFewRows ? 1 : std::clamp<uint64_t>(wanted, 1, 2048);
    while ((words - 1) >> shift >= most) ++shift;
    count = static_cast<int64_t>((words - 1) >> shift) + 1;
  }
  int64_t of(uint64_t cell) const { return static_cast<int64_t>(cell >> (shift + 6)); }
  int64_t within(uint64_t cell) const { return static_cast<int64_t>(cell & ((uint64_t{64} << shift) - 1)); }
  uint64_t first_cell(int64_t range) const { return static_cast<uint64_t>(range) << (shift + 6); }

  static constexpr int64_t kFewRows = 1 << 15;

  int shift = 0;
  int64_t count;
};

// The bits of the cells of one range. A view, to be copied into loops, where its members are in registers.
class Bits {
 public:
  Bits(uint64_t* words, uint32_t* before, int64_t size) : words_(words), before_(before), size_(size) {}

  void clear() const { std::fill_n(words_, size_, 0); }
  void set(int64_t cell) const { words_[cell >> 6] |= bit(cell); }
  bool has(int64_t cell) const { return (words_[cell >> 6] & bit(cell)) != 0; }
  // To be called before rank; returns how many bits are set.
  int64_t number() const { return CVC_ISA_PICK(cell_kernels)()->bits_before(words_, size_, before_); }
  // How many bits come before the cell's.
  int64_t rank(int64_t cell) const {
    return before_[cell >> 6] + __builtin_popcountll(words_[cell >> 6] & (bit(cell) - 1));
  }

 private:
  static uint64_t bit(int64_t cell) { return uint64_t{1} << (cell & 63); }

  uint64_t* words_;
  uint32_t* before_;
  int64_t size_;
};

// Room for them.
struct BitSpace {
  explicit BitSpace(const Ranges& ranges)
      : words(int64_t{1} << ranges.shift), before(words.size()), bits(words.data(), before.data(), words.size()) {}

  Buffer<uint64_t> words;
  Buffer<uint32_t> before;
  Bits bits;
};

}  // namespace cvc::voxels
