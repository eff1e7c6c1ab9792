// Triangles sorted into cells of 8³ voxels by bounding spheres.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "common/buffer.h"
#include "sdf/narrow_band.h"
#include "sdf/narrow_band_sphere.h"

namespace cvc::narrow_band {

constexpr int64_t kBytesPerVoxel = 36;  // of the output, and of what is held until it is written

// Physical memory of this machine; generous where it is unknown.
int64_t memory_bytes();

// Runs task(0) .. task(n - 1), some of them at the same time. A std::bad_alloc of theirs reaches the caller.
struct Parallel {
  int64_t threads;
  std::function<void(int64_t n, const std::function<void(int64_t)>& task)> run;
};

// Cells (and blocks) along z that share batch, x and y.
struct CellRow {
  int32_t batch, x, y;
  uint32_t first, last;  // into Bins::cell_z and Bins::begin
};

struct Bins {
  Buffer<uint32_t> packed, face;  // spheres sorted by (batch, x, y, z) of their cell, then by face; 16 more for loads
  std::vector<int32_t> cell_z;    // [cells]
  std::vector<uint32_t> begin;    // [cells + 1]
  std::vector<CellRow> rows;      // sorted
  int32_t reach = 1;              // a block's triangles are in the cells at most this far away, along each axis
  Status status = Status::ok;
};

template <class Real, class Index>
Bins make_bins(const Mesh<Real, Index>& mesh, const int64_t* face_batch, const Grid& grid,
               SphereKernel<Real, Index> kernel, const Parallel& parallel);

}  // namespace cvc::narrow_band
