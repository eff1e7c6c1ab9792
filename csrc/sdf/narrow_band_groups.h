// Groups of triangles that lie close together, for meshes whose triangles are much smaller than a voxel.
#pragma once

#include <cstdint>
#include <vector>

#include "common/buffer.h"
#include "sdf/narrow_band_bins.h"

namespace cvc::narrow_band {

struct Groups {
  Buffer<float> numbers;
  GroupList boxes{};                    // into `numbers`
  std::vector<uint32_t> begin;          // [cells]: the first group of each cell
  Buffer<uint32_t> vertices;            // that groups share, by cell
  std::vector<int64_t> vertices_begin;  // [cells]
  bool any() const { return !begin.empty(); }
};

// No groups where triangles are not many. Otherwise the spheres of each cell are put in the order of a Morton curve.
template <class Real, class Index>
Groups make_groups(const Mesh<Real, Index>& mesh, const Grid& grid, Bins& bins, GroupKernel<Real, Index> kernel,
                   const Parallel& parallel);

}  // namespace cvc::narrow_band
