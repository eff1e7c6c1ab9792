// Scans rows of voxels, compiled once per instruction set (common/isa.h).
#include "common/isa.h"
#include "common/simd.h"
#include "voxels/keys.h"
#include "voxels/scan_rows.h"

namespace cvc::voxels {
namespace {

constexpr int kRow = 4;  // numbers
typedef Vec<int32_t, kRow> Row;

// The key of a row that is a voxel, by one shuffle.
inline uint64_t key_of(Row row) {
  typedef Vec<uint8_t, 16> Bytes;
  const Bytes bytes = reinterpret_cast<Bytes>(row);
  return reinterpret_cast<Vec<uint64_t, 2>>(
      __builtin_shufflevector(bytes, bytes, 12, 13, 8, 9, 4, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0))[0];
}

// Takes rows in order, and at last tells what they were like.
struct Scanner {
  Scan scan;
  Row lowest = {INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX}, highest = {INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN};
  int64_t before, equal = 0;  // the key before, and how many rows were as the one before them

  void one(const int32_t* coords, int64_t row, uint64_t* keys, uint32_t* short_keys) {
    const Row voxel = load<Row>(coords + kRow * row);
    lowest = voxel < lowest ? voxel : lowest;
    highest = voxel > highest ? voxel : highest;
    const int64_t key = static_cast<int64_t>(key_of(voxel));
    scan.descent = key < before ? row : scan.descent;
    scan.descents += key < before;
    equal += key == before;
    before = key;
    if (keys) keys[row] = static_cast<uint64_t>(key);
    if (short_keys) short_keys[row] = short_key(static_cast<uint64_t>(key));
  }

#if defined(CVC_SIMD_AVX512)
  // As many rows as are whole groups of eight keys; returns where it stops.
  int64_t many(const int32_t* coords, int64_t begin, int64_t end, uint64_t* keys, uint32_t* short_keys) {
    constexpr int kGroup = 8;
    typedef Vec<uint64_t, kGroup> Keys;
    if (end - begin < kGroup) return begin;
    // Of four rows each: the words of fields 3, 2, 1, 0 of eight rows become eight keys.
    const __m512i fields = _mm512_set_epi16(56, 58, 60, 62, 48, 50, 52, 54, 40, 42, 44, 46, 32, 34, 36, 38,  //
                                            24, 26, 28, 30, 16, 18, 20, 22, 8, 10, 12, 14, 0, 2, 4, 6);
    __m512i least = _mm512_set1_epi32(INT32_MAX), most = _mm512_set1_epi32(INT32_MIN);
    __m512i last = _mm512_set1_epi64(before);
    unsigned last_descents = 0;
    int64_t row = begin, last_row = 0;
    for (; end - row >= kGroup; row += kGroup) {
      const __m512i low = _mm512_loadu_si512(coords + kRow * row);
      const __m512i high = _mm512_loadu_si512(coords + kRow * row + 16);
      least = _mm512_min_epi32(_mm512_min_epi32(low, high), least);
      most = _mm512_max_epi32(_mm512_max_epi32(low, high), most);
      const __m512i group = _mm512_permutex2var_epi16(low, fields, high);
      const __m512i shifted = _mm512_alignr_epi64(group, last, 7);
      const unsigned descents = _mm512_cmplt_epi64_mask(group, shifted);
      scan.descents += __builtin_popcount(descents);
      last_row = descents ? row : last_row;
      last_descents = descents ? descents : last_descents;
      equal += __builtin_popcount(_mm512_cmpeq_epi64_mask(group, shifted));
      if (keys) _mm512_storeu_si512(keys + row, group);
      if (short_keys)
        store(short_keys + row, __builtin_convertvector(short_fields((Keys)group), Vec<uint32_t, kGroup>));
      last = group;
    }
    if (last_descents) scan.descent = last_row + 31 - __builtin_clz(last_descents);
    before = last[7];
    int32_t lows[16], highs[16];
    _mm512_storeu_si512(lows, least);
    _mm512_storeu_si512(highs, most);
    for (int k = 0; k < 16; k += kRow) {
      const Row a = load<Row>(lows + k), b = load<Row>(highs + k);
      lowest = a < lowest ? a : lowest;
      highest = b > highest ? b : highest;
    }
    return row;
  }
#else
  // Blocks of rows: first their keys, then what these compare like, both in vectors.
  int64_t many(const int32_t* coords, int64_t begin, int64_t end, uint64_t* keys, uint32_t* short_keys) {
    constexpr int64_t kBlock = 512;
    uint64_t scratch[kBlock];
    Row least = lowest, most = highest;
    for (int64_t from = begin; from < end; from += kBlock) {
      const int64_t count = end - from < kBlock ? end - from : kBlock;
      uint64_t* const key = keys ? keys + from : scratch;
      for (int64_t k = 0; k < count; ++k) {
        const Row row = load<Row>(coords + kRow * (from + k));
        least = row < least ? row : least;
        most = row > most ? row : most;
        key[k] = key_of(row);
      }
      if (short_keys)
        for (int64_t k = 0; k < count; ++k) short_keys[from + k] = short_key(key[k]);
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
    lowest = least;
    highest = most;
    return end;
  }
#endif

  Scan finish(bool empty) {
    scan.distinct = equal == 0;
    scan.ascending = scan.descents == 0;
    for (int k = 0; k < kRow; ++k)
      scan.in_range &= lowest[k] >= 0 && highest[k] < static_cast<int64_t>(k == 0 ? kMaxBatch : kMaxCoord);
    if (!empty && scan.in_range) {
      scan.lowest = key_of(lowest);
      scan.highest = key_of(highest);
    }
    scan.in_range |= empty;
    return scan;
  }
};

}  // namespace

Scan CVC_ISA_NAME(scan_rows)(const int32_t* coords, int64_t begin, int64_t end, uint64_t* keys, uint32_t* short_keys) {
  Scanner scanner;
  // The first row of all compares with nothing: as if a smaller one came before it.
  scanner.before = begin > 0 ? static_cast<int64_t>(key_of(load<Row>(coords + kRow * (begin - 1)))) : -1;
  int64_t row = scanner.many(coords, begin, end, keys, short_keys);
  for (; row < end; ++row) scanner.one(coords, row, keys, short_keys);
  return scanner.finish(begin >= end);
}

}  // namespace cvc::voxels
