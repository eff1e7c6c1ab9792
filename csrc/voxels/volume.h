// Dense volumes [B, C, X, Y, Z] and the cells that voxels are in them.
//
// Used by files that are compiled once per instruction set: always inline, so that no copy is left to be shared.
#pragma once

#include <cstdint>

namespace cvc::voxels {

struct Volume {
  uint32_t size[4];  // batch, x, y, z

  [[gnu::always_inline]] int64_t cells() const { return int64_t{size[1]} * size[2] * size[3]; }
  [[gnu::always_inline]] bool holds(const int32_t* c) const {
    return static_cast<uint32_t>(c[0]) < size[0] && static_cast<uint32_t>(c[1]) < size[1] &&
           static_cast<uint32_t>(c[2]) < size[2] && static_cast<uint32_t>(c[3]) < size[3];
  }
  // The place of a voxel among the cells of all volumes; any number for one that lies outside.
  [[gnu::always_inline]] int64_t cell(const int32_t* c) const {
    const uint64_t line = uint64_t{static_cast<uint32_t>(c[0])} * size[1] + static_cast<uint32_t>(c[1]);
    return static_cast<int64_t>((line * size[2] + static_cast<uint32_t>(c[2])) * size[3] + static_cast<uint32_t>(c[3]));
  }
};

struct Order {
  bool inside = true, ascending = true;  // ascending: strictly, so that no voxel is there twice
};

}  // namespace cvc::voxels
