// Neighbour maps on the CPU.
//
// For a fixed (kx, ky) the inputs that ascending outputs look for ascend too: one cursor per pair walks through the
// sorted keys once, and the Kz neighbours of a column lie right behind it. Where a cursor would have to go back, at the
// start of a task or between outputs that do not ascend, a binary search sets it anew.
#pragma once

#include <vector>

#include "sparse_conv/geometry.h"
#include "voxels/ascending.h"

namespace cvc::sparse_conv {

class Cursors {
 public:
  Cursors(const Geometry& geometry, const voxels::Ascending& in)
      : g_(geometry), in_(in), at_(g_.axis[0].kernel * g_.axis[1].kernel, kUnset) {}

  // The rows of the Kx·Ky·Kz input voxels that one output voxel sees, −1 where there is none.
  void find(const int32_t* out, int32_t* found) {
    const int64_t kernel_z = g_.axis[2].kernel, count = in_.size;
    int64_t z[kMaxKernel], lowest = -1;
    for (int64_t k = 0; k < kernel_z; ++k) {
      z[k] = g_.axis[2].source(out[3], k, g_.transposed);
      if (z[k] >= 0 && (lowest < 0 || z[k] < lowest)) lowest = z[k];
    }
    // Ascending z: with the offset, transposed against it.
    const int64_t first = g_.transposed ? kernel_z - 1 : 0, step = g_.transposed ? -1 : 1;
    for (int64_t kx = 0, column = 0; kx < g_.axis[0].kernel; ++kx) {
      const int64_t x = g_.axis[0].source(out[1], kx, g_.transposed);
      for (int64_t ky = 0; ky < g_.axis[1].kernel; ++ky, ++column, found += kernel_z) {
        for (int64_t k = 0; k < kernel_z; ++k) found[k] = -1;
        const int64_t y = g_.axis[1].source(out[2], ky, g_.transposed);
        if (x < 0 || y < 0 || lowest < 0) continue;
        const uint64_t base = make_key(out[0], x, y, 0);
        int64_t at = seek(at_[column], base + lowest);
        at_[column] = at;
        for (int64_t k = first; k >= 0 && k < kernel_z; k += step) {
          if (z[k] < 0) continue;
          const uint64_t key = base + z[k];
          while (at < count && in_.key(at) < key) ++at;
          if (at < count && in_.key(at) == key) found[k] = static_cast<int32_t>(in_.row(at));
        }
      }
    }
  }

 private:
  static constexpr int64_t kUnset = -1;

  int64_t seek(int64_t at, uint64_t key) const {
    const uint64_t* const keys = in_.keys;
    const int64_t count = in_.size;
    if (at == kUnset || (at > 0 && keys[at - 1] >= key)) return in_.find(key);
    for (int64_t stride = 1; at < count && keys[at] < key;) {
      if (at + stride < count && keys[at + stride] < key) {
        at += stride;
        stride *= 2;
      } else if (stride > 1) {
        return std::lower_bound(keys + at + 1, keys + min(at + stride, count), key) - keys;
      } else {
        ++at;
      }
    }
    return at;
  }

  const Geometry& g_;
  const voxels::Ascending& in_;
  std::vector<int64_t> at_;
};

}  // namespace cvc::sparse_conv
