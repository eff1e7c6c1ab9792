// Reads the features of voxels out of a dense volume; see isa_gather_cells.cpp.
#pragma once

#include "voxels/volume.h"

namespace cvc::voxels {

struct CellGather {
  const void* dense;  // [B, C, X, Y, Z]
  Volume volume;
  int64_t channels;
  int64_t width;  // bytes of a number: 2, 4 or 8
  const int32_t* coords;
  void* out;         // [N, C]
  bool past_caches;  // whether what is written is too much to stay in the caches
};

// Rows [begin, end); of these, row `begin` is compared with the one before it. Where a voxel lies outside it stops.
Order gather_cells_baseline(const CellGather& gather, int64_t begin, int64_t end);
Order gather_cells_avx2(const CellGather& gather, int64_t begin, int64_t end);
Order gather_cells_avx512(const CellGather& gather, int64_t begin, int64_t end);

}  // namespace cvc::voxels
