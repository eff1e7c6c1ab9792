// The one pass over given voxels: their keys, whether they are voxels, how they are ordered, what box they fill.
#pragma once

#include "common/isa.h"
#include "voxels/keys.h"
#include "voxels/scan_rows.h"
#include "voxels/tasks.h"

namespace cvc::voxels {

inline Scan scan_rows(const int32_t* coords, int64_t begin, int64_t end, uint64_t* keys,
                      uint32_t* short_keys = nullptr) {
  return CVC_ISA_PICK(scan_rows)(coords, begin, end, keys, short_keys);
}

inline uint64_t fields_least(uint64_t a, uint64_t b) {
  uint64_t out = 0;
  for (int shift = 0; shift < 64; shift += 16) out |= min(a >> shift & 0xFFFF, b >> shift & 0xFFFF) << shift;
  return out;
}
inline uint64_t fields_most(uint64_t a, uint64_t b) {
  uint64_t out = 0;
  for (int shift = 0; shift < 64; shift += 16) out |= max(a >> shift & 0xFFFF, b >> shift & 0xFFFF) << shift;
  return out;
}

// Of two sets taken together, or of two parts of one.
inline Scan operator+(const Scan& a, const Scan& b) {
  Scan both;
  both.in_range = a.in_range && b.in_range;
  both.ascending = a.ascending && b.ascending;
  both.distinct = a.distinct && b.distinct;
  both.descents = a.descents + b.descents;
  both.descent = max(a.descent, b.descent);
  both.lowest = fields_least(a.lowest, b.lowest);
  both.highest = fields_most(a.highest, b.highest);
  return both;
}

inline Scan scan_all(const int32_t* coords, int64_t n, uint64_t* keys, uint32_t* short_keys = nullptr) {
  const Chunks chunks(n);
  std::vector<Scan> scans(chunks.count);
  for_each_task(chunks.count,
                [&](int64_t c) { scans[c] = scan_rows(coords, chunks.begin(c), chunks.end(c), keys, short_keys); });
  Scan total;
  for (const Scan& scan : scans) total = total + scan;
  return total;
}

// One or two sets of voxels as given, with their keys one after the other, or without, with their short keys.
struct Rows {
  using Tensor = torch::stable::Tensor;

  explicit Rows(const Tensor& a, bool packed = true)
      : first(a.size(0)),
        size(first),
        keys(packed ? size : 0),
        short_keys(packed ? 0 : size),
        scan{read(a, 0, packed), Scan()} {}
  Rows(const Tensor& a, const Tensor& b, bool packed = true)
      : first(a.size(0)),
        size(first + b.size(0)),
        keys(packed ? size : 0),
        short_keys(packed ? 0 : size),
        scan{read(a, 0, packed), read(b, first, packed)} {}

  int64_t faults() const { return !scan[0].in_range * kOutOfRange | !scan[1].in_range * kOutOfRangeSecond; }

  // Those of a set, or null where there are none or one of its voxels is too large for them.
  const uint32_t* short_keys_of(int set) const {
    const bool any = short_keys.size() > 0 && has_short_key(scan[set].highest);
    return any ? short_keys.data() + (set == 0 ? 0 : first) : nullptr;
  }

  int64_t first, size;  // rows of the first set, of both
  Buffer<uint64_t> keys;
  Buffer<uint32_t> short_keys;
  Scan scan[2];

 private:
  Scan read(const Tensor& coords, int64_t offset, bool packed) {
    return scan_all(static_cast<const int32_t*>(coords.const_data_ptr()), coords.size(0),
                    packed ? keys.data() + offset : nullptr, packed ? nullptr : short_keys.data() + offset);
  }
};

// Whether the first rows are in order: the others are likely to be, too.
inline bool starts_in_order(const torch::stable::Tensor& coords) {
  const int64_t n = min<int64_t>(coords.size(0), 1024);
  return scan_rows(static_cast<const int32_t*>(coords.const_data_ptr()), 0, n, nullptr).ascending;
}

}  // namespace cvc::voxels
