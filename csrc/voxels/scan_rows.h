// What one pass over given voxels finds; see isa_scan_rows.cpp.
#pragma once

#include <cstdint>

namespace cvc::voxels {

struct Scan {
  bool in_range = true;
  bool ascending = true;                        // rows may repeat
  bool distinct = true;                         // no row equals the one before it
  int64_t descents = 0;                         // rows that are less than the one before them
  int64_t descent = 0;                          // the last of these
  uint64_t lowest = ~uint64_t{0}, highest = 0;  // fields of keys: of every column on its own
};

// Scans rows [begin, end) of which row `begin` is compared with the one before it; writes their keys and their short
// keys (voxels/keys.h) unless null.
Scan scan_rows_baseline(const int32_t* coords, int64_t begin, int64_t end, uint64_t* keys, uint32_t* short_keys);
Scan scan_rows_avx2(const int32_t* coords, int64_t begin, int64_t end, uint64_t* keys, uint32_t* short_keys);
Scan scan_rows_avx512(const int32_t* coords, int64_t begin, int64_t end, uint64_t* keys, uint32_t* short_keys);

}  // namespace cvc::voxels
