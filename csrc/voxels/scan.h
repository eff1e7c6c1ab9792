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

// The key of a row that is a voxel, by one shuffle.
typedef int32_t Row __attribute__((vector_size(16)));
inline uint64_t key_of(Row row) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef uint64_t Pair __attribute__((vector_size(16)));
  const Bytes bytes = reinterpret_cast<Bytes>(row);
  return reinterpret_cast<Pair>(
      __builtin_shufflevector(bytes, bytes, 12, 13, 8, 9, 4, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0))[0];
}

// Scans rows [begin, end) of which row `begin` is compared with the one before it; writes their keys unless null.
inline Scan scan_rows(const int32_t* coords, int64_t begin, int64_t end, uint64_t* keys) {
  constexpr int64_t kBlock = 512;  // rows: first their keys, then what these compare like, both in vectors
  uint64_t scratch[kBlock];
  Row lowest = {INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX}, highest = {INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN};
  Scan scan;
  // The first row of all compares with nothing: as if a smaller one came before it.
  int64_t before = begin > 0 ? static_cast<int64_t>(key_of(coords + 4 * (begin - 1))) : -1, equal = 0;
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t count = min(kBlock, end - from);
    uint64_t* const key = keys ? keys + from : scratch;
    for (int64_t k = 0; k < count; ++k) {
      Row row;
      std::memcpy(&row, coords + 4 * (from + k), sizeof row);
      lowest = row < lowest ? row : lowest;
      highest = row > highest ? row : highest;
      key[k] = key_of(row);
    }
    const auto at = [=](int64_t k) { return static_cast<int64_t>(key[k]); };
    int64_t descents = at(0) < before;
    equal += at(0) == before;
    for (int64_t k = 1; k < count; ++k) {
      descents += at(k) < at(k - 1);
      equal += at(k) == at(k - 1);
    }
    if (descents > 0) {
      int64_t last = count - 1;
      while (last > 0 && at(last) >= at(last - 1)) --last;
      scan.descent = from + last;
    }
    scan.descents += descents;
    before = at(count - 1);
  }
  scan.distinct = equal == 0;
  scan.ascending = scan.descents == 0;
  for (int k = 0; k < 4; ++k)
    scan.in_range &= lowest[k] >= 0 && highest[k] < static_cast<int64_t>(k == 0 ? kMaxBatch : kMaxCoord);
  if (end > begin && scan.in_range) {
    scan.lowest = key_of(lowest);
    scan.highest = key_of(highest);
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

  explicit Rows(const Tensor& a, bool packed = true)
      : first(a.size(0)), size(first), keys(packed ? size : 0), scan{read(a, 0, packed), Scan()} {}
  Rows(const Tensor& a, const Tensor& b, bool packed = true)
      : first(a.size(0)),
        size(first + b.size(0)),
        keys(packed ? size : 0),
        scan{read(a, 0, packed), read(b, first, packed)} {}

  int64_t faults() const { return !scan[0].in_range * kOutOfRange | !scan[1].in_range * kOutOfRangeSecond; }

  int64_t first, size;  // rows of the first set, of both
  Buffer<uint64_t> keys;
  Scan scan[2];

 private:
  Scan read(const Tensor& coords, int64_t offset, bool packed) {
    return scan_all(static_cast<const int32_t*>(coords.const_data_ptr()), coords.size(0),
                    packed ? keys.data() + offset : nullptr);
  }
};

// Whether the first rows are in order: the others are likely to be, too.
inline bool starts_in_order(const torch::stable::Tensor& coords) {
  const int64_t n = min<int64_t>(coords.size(0), 1024);
  return scan_rows(static_cast<const int32_t*>(coords.const_data_ptr()), 0, n, nullptr).ascending;
}

}  // namespace cvc::voxels
