// Where ascending, distinct voxels are, by the bits of the box that they fill: one word tells whether a voxel is there
// and how many come before it. A look-up is one line of the cache, without a search.
#pragma once

#include "voxels/ascending.h"
#include "voxels/cells.h"

namespace cvc::voxels {

class Places {
 public:
  // Whether the bits are not much larger than the voxels.
  static bool suit(const Ascending& voxels) {
    if (voxels.size == 0 || !voxels.distinct) return false;
    const Box box(voxels.given.scan[0]);
    return box.suits(voxels.size) && box.cells() / 64 <= 4 * static_cast<uint64_t>(voxels.size + 64);
  }

  explicit Places(const Ascending& voxels) : box(voxels.given.scan[0]), words_(static_cast<int64_t>(box.cells() / 64)) {
    for_each_range(words_.size(), [&](int64_t begin, int64_t end) {
      std::memset(static_cast<void*>(words_.data() + begin), 0, (end - begin) * sizeof(Word));
    });
    // A word belongs to the range that its first voxel lies in.
    const auto cell_of = [&](int64_t i) {
      int32_t c[4];
      write_voxel(voxels.key(i), c);
      return box.cell(c);
    };
    for_each_range(voxels.size, [&](int64_t begin, int64_t end) {
      uint64_t last = begin > 0 ? cell_of(begin - 1) / 64 : ~uint64_t{0};
      const uint64_t foreign = last;
      for (int64_t i = begin; i < voxels.size; ++i) {
        const uint64_t cell = cell_of(i), own = cell / 64;
        if (i >= end && own != last) break;
        if (own == foreign) {
          if (i + 1 >= end) break;
          continue;
        }
        Word& word = words_[static_cast<int64_t>(own)];
        if (own != last) word.before = i;
        word.bits |= uint64_t{1} << (cell % 64);
        last = own;
      }
    });
  }

  [[gnu::always_inline]] void prefetch(uint64_t cell) const { __builtin_prefetch(words_.data() + cell / 64); }
  // The place of the voxel in a cell of the box among the ascending ones, or -1.
  int64_t find(uint64_t cell) const {
    const Word& word = words_[static_cast<int64_t>(cell / 64)];
    const uint64_t bit = uint64_t{1} << (cell % 64);
    return word.bits & bit ? word.before + __builtin_popcountll(word.bits & (bit - 1)) : -1;
  }

 private:
  struct alignas(16) Word {
    uint64_t bits;
    int64_t before;
  };

 public:
  const Box box;

 private:
  Buffer<Word> words_;
};

}  // namespace cvc::voxels
