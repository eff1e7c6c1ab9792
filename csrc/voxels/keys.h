// Voxels (batch, x, y, z) as integers that compare like them: 15 + 3 × 16 bits.
#pragma once

#include <cstring>

#include "common/hd.h"

namespace cvc::voxels {

constexpr int kCoordBits = 16, kBatchBits = 15, kKeyBits = kBatchBits + 3 * kCoordBits;
constexpr uint32_t kMaxBatch = 1u << kBatchBits, kMaxCoord = 1u << kCoordBits;

// What kernels report to Python, as bits: of the first and of the second set of voxels.
enum Fault : int64_t { kOutOfRange = 1, kOutOfRangeSecond = 2, kDuplicate = 4, kDuplicateSecond = 8 };

// Whether a row of coordinates is a voxel at all.
CVC_HD inline bool is_voxel(const int32_t* c) {
  return static_cast<uint32_t>(c[0]) < kMaxBatch && static_cast<uint32_t>(c[1] | c[2] | c[3]) < kMaxCoord;
}

// The key of a row that is a voxel; in [0, 2^63).
CVC_HD inline uint64_t key_of(const int32_t* c) {
  uint64_t bx, yz;
  memcpy(&bx, c, sizeof bx);
  memcpy(&yz, c + 2, sizeof yz);
  return bx << 48 | (bx >> 32) << 32 | (yz & 0xFFFF) << 16 | yz >> 32;
}

// Short keys, of voxels that are small enough: 2 bits for the batch, 10 for a coordinate.
constexpr int kShortBits = 10;
template <class Key>  // a number or a vector of them
CVC_HD inline Key short_fields(Key key) {
  constexpr uint64_t kField = (1 << kShortBits) - 1;
  return (key >> 18 & kField << 30) | (key >> 12 & kField << 20) | (key >> 6 & kField << 10) | (key & kField);
}
CVC_HD inline uint32_t short_key(uint64_t key) { return static_cast<uint32_t>(short_fields(key)); }
// Whether no field of keys that are at most this, field by field, is too large.
CVC_HD inline bool has_short_key(uint64_t highest) { return (highest & ~uint64_t{0x000303FF03FF03FF}) == 0; }

CVC_HD inline void write_voxel(uint64_t key, int32_t* c) {
  const uint64_t bx = key >> 48 | (key >> 32 & 0xFFFF) << 32, yz = (key >> 16 & 0xFFFF) | (key & 0xFFFF) << 32;
  memcpy(c, &bx, sizeof bx);
  memcpy(c + 2, &yz, sizeof yz);
}

}  // namespace cvc::voxels
