// The one pass over given voxels: their keys, whether they are voxels, how they are ordered, what box they fill.
#pragma once

#include "voxels/keys.h"
#include "voxels/tasks.h"

namespace cvc::voxels {

struct Scan {
  bool in_range = true;
  bool ascending = true;                        // rows may repeat
  bool distinct = true;                         // no row equals the one before it
  int64_t descents = 0;                         // rows that are less than the one before them
  int64_t descent = 0;                          // the last of these
  uint64_t lowest = ~uint64_t{0}, highest = 0;  // fields of keys: of every column on its own
};

// Scans rows [begin, end) of which row `begin` is compared with the one before it; writes their keys unless null.
inline Scan scan_rows(const int32_t* coords, int64_t begin, int64_t end, uint64_t* keys) {
  typedef int32_t Row __attribute__((vector_size(16)));
  Row lowest = {INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX}, highest = {INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN};
  Scan scan;
  uint64_t before = begin > 0 ? key_of(coords + 4 * (begin - 1)) : 0;
  int64_t equal = 0;
  for (int64_t i = begin; i < end; ++i) {
    Row row;
    std::memcpy(&row, coords + 4 * i, sizeof row);
    lowest = row < lowest ? row : lowest;
    highest = row > highest ? row : highest;
    const uint64_t key = key_of(coords + 4 * i);
    equal += key == before;
    const bool less = key < before;  // without a branch: in random order it would be guessed wrong every other time
    scan.descents += less;
    scan.descent = less ? i : scan.descent;
    if (keys) keys[i] = key;
    before = key;
  }
  if (begin == 0 && end > 0) equal -= key_of(coords) == 0;  // compared with nothing
  scan.distinct = equal == 0;
  scan.ascending = scan.descents == 0;
  for (int k = 0; k < 4; ++k)
    scan.in_range &= lowest[k] >= 0 && highest[k] < static_cast<int64_t>(k == 0 ? kMaxBatch : kMaxCoord);
  if (end > begin && scan.in_range) {
    alignas(16) int32_t low[4], high[4];
    std::memcpy(low, &lowest, sizeof low);
    std::memcpy(high, &highest, sizeof high);
    scan.lowest = key_of(low);
    scan.highest = key_of(high);
  }
  scan.in_range |= begin >= end;
  return scan;
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

inline Scan scan_all(const int32_t* coords, int64_t n, uint64_t* keys) {
  const Chunks chunks(n);
  std::vector<Scan> scans(chunks.count);
  for_each_task(chunks.count, [&](int64_t c) { scans[c] = scan_rows(coords, chunks.begin(c), chunks.end(c), keys); });
  Scan total;
  for (const Scan& scan : scans) total = total + scan;
  return total;
}

// One or two sets of voxels as given, with their keys one after the other.
struct Rows {
  using Tensor = torch::stable::Tensor;

  explicit Rows(const Tensor& a) : first(a.size(0)), size(first), keys(size), scan{read(a, 0), Scan()} {}
  Rows(const Tensor& a, const Tensor& b)
      : first(a.size(0)), size(first + b.size(0)), keys(size), scan{read(a, 0), read(b, first)} {}

  int64_t faults() const { return !scan[0].in_range * kOutOfRange | !scan[1].in_range * kOutOfRangeSecond; }

  int64_t first, size;  // rows of the first set, of both
  Buffer<uint64_t> keys;
  Scan scan[2];

 private:
  Scan read(const Tensor& coords, int64_t offset) {
    return scan_all(static_cast<const int32_t*>(coords.const_data_ptr()), coords.size(0), keys.data() + offset);
  }
};

}  // namespace cvc::voxels
