// Voxels in order as slabs: stretches of rows whose parents have one x. A task works on whole slabs, one after the
// other.
#pragma once

#include "voxels/coarsen.h"
#include "voxels/tensors.h"

namespace cvc::voxels {

struct Factor {
  Factor(int64_t fx, int64_t fy, int64_t fz) : x(fx), y(fy), z(fz) {}

  const Divider x, y, z;

  uint32_t most() const { return std::max({x.value, y.value, z.value}); }
  // The least key in the slab of a voxel, and that of the next slab.
  uint64_t slab(uint64_t key) const { return key >> 48 << 48 | first_x(key) << 32; }
  uint64_t next_slab(uint64_t key) const {
    return (key >> 48 << 48) + (std::min(first_x(key) + x.value, uint64_t{kMaxCoord}) << 32);
  }

 private:
  uint64_t first_x(uint64_t key) const { return uint64_t{x(key >> 32 & 0xFFFF)} * x.value; }
};

// Rows that are likely to be in order.
struct OrderedRows {
  explicit OrderedRows(const torch::stable::Tensor& tensor) : size(tensor.size(0)), coords(coords_of(tensor)) {}

  uint64_t key(int64_t i) const { return key_of(coords + 4 * i); }
  // The first row of [begin, end) whose key is not less; any of them when rows are out of order.
  int64_t find(uint64_t key, int64_t begin, int64_t end) const {
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (this->key(middle) < key) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }
  // Where tasks begin, and the last one ends: at slabs.
  std::vector<int64_t> cut(const Factor& factor) const {
    const Chunks chunks(size, 1 << 13);
    std::vector<int64_t> begin(chunks.count + 1, 0);
    for (int64_t c = 1; c < chunks.count; ++c)
      begin[c] = find(factor.slab(key(chunks.begin(c))), begin[c - 1], chunks.begin(c));
    begin[chunks.count] = size;
    return begin;
  }

  int64_t size;
  const int32_t* coords;
};

}  // namespace cvc::voxels
