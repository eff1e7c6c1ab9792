// Finds the parents of eight children, compiled once per instruction set (common/isa.h).
#include "common/isa.h"
#include "common/simd.h"
#include "voxels/keys.h"
#include "voxels/octants.h"

namespace cvc::voxels {
namespace {

// --- marking ---------------------------------------------------------------------------------------------------------

constexpr int kRow = 4;  // numbers
typedef Vec<uint32_t, kRow> Row;

// Takes rows in order, marks them, and at last tells what they were like.
struct Marker {
  const OctantMap map;  // a copy, which no store can change
  const int32_t* const coords;
  const uint64_t limit;
  int64_t before;  // the key before
  int64_t even = 0;
  uint64_t descents = 0;  // 0: none
  Row all = {}, least = ~Row{}, most = {};

  void mark(uint32_t mark) { map.children[mark >> 8] |= static_cast<uint8_t>(mark); }

  bool one(int64_t row) {
    const int32_t* const at = coords + kRow * row;
    fetch_ahead(at);
    const uint64_t key = key_of(at);
    if (key >= limit) return false;
    const Row voxel = load<Row>(reinterpret_cast<const uint32_t*>(at));
    all |= voxel;
    least = voxel < least ? voxel : least;
    most = voxel > most ? voxel : most;
    descents |= static_cast<int64_t>(key) <= before;
    before = static_cast<int64_t>(key);
    const uint32_t x = static_cast<uint32_t>(key >> 32) & map.half[0];
    const uint32_t y = static_cast<uint32_t>(key >> 16 & 0xFFFF), z = static_cast<uint32_t>(key & 0xFFFF);
    even += !x;
    const int64_t line = y >> map.half[1] & (map.lines - 1), place = z >> map.half[2] & (map.width - 1);
    map.children[line * map.width + place] |=
        static_cast<uint8_t>(1 << (4 * x + 2 * (y & map.half[1]) + (z & map.half[2])));
    return true;
  }

#if defined(CVC_SIMD_AVX512)
  // Sixteen rows at a time as (place << 8 | bit), as long as none is beyond the limit; returns where it stops. Of two
  // neighbours along z with one parent only the second is marked, for both.
  int64_t many(int64_t row, int64_t end) {
    constexpr int64_t kGroup = 16, kBlock = 32 * kGroup;
    uint32_t marks[kBlock + kGroup];
    // Of four rows each: the words of fields 3, 2, 1, 0 of eight rows become eight keys.
    const __m512i fields = _mm512_set_epi16(56, 58, 60, 62, 48, 50, 52, 54, 40, 42, 44, 46, 32, 34, 36, 38,  //
                                            24, 26, 28, 30, 16, 18, 20, 22, 8, 10, 12, 14, 0, 2, 4, 6);
    // Of y, z as two words.
    const auto both = [](int64_t y, int64_t z) { return _mm512_set1_epi32(static_cast<int32_t>(y << 16 | z)); };
    const __m512i halves = both(map.half[1], map.half[2]), strides = both(map.width, 1);
    const __m512i within = both(map.lines - 1, map.width - 1);
    const __m512i odd_x = _mm512_set1_epi64(int64_t{map.half[0]} << 32), pair = _mm512_set1_epi64(map.half[2]);
    const __m512i beyond = _mm512_set1_epi64(static_cast<int64_t>(limit));
    __m512i any = _mm512_setzero_si512(), low = _mm512_set1_epi32(-1), high = any;
    __m512i last = _mm512_set1_epi64(before), last_mark = any;
    unsigned not_greater = 0;
    bool inside = true;
    while (inside && end - row >= kGroup) {
      int64_t n = 0;
      for (const int64_t stop = end - row < kBlock ? end : row + kBlock; stop - row >= kGroup; row += kGroup) {
        __m512i quad[4], keys[2], shifted[2];
        for (int k = 0; k < 4; ++k) {
          const int32_t* const at = coords + kRow * (row + 4 * k);
          fetch_ahead(at);
          quad[k] = _mm512_loadu_si512(at);
        }
        for (int k = 0; k < 2; ++k) keys[k] = _mm512_permutex2var_epi16(quad[2 * k], fields, quad[2 * k + 1]);
        if (_mm512_cmpge_epu64_mask(keys[0], beyond) | _mm512_cmpge_epu64_mask(keys[1], beyond)) {
          inside = false;
          break;
        }
        any = _mm512_ternarylogic_epi64(any, quad[0], quad[1], 0xFE);
        any = _mm512_ternarylogic_epi64(any, quad[2], quad[3], 0xFE);
        shifted[0] = _mm512_alignr_epi64(keys[0], last, 7);
        shifted[1] = _mm512_alignr_epi64(keys[1], keys[0], 7);
        last = keys[1];
        unsigned odd = 0, second = 0;
        for (int k = 0; k < 2; ++k) {
          not_greater |= _mm512_cmple_epi64_mask(keys[k], shifted[k]);
          odd |= unsigned{_mm512_test_epi64_mask(keys[k], odd_x)} << (8 * k);
          second |= unsigned{_mm512_cmpeq_epi64_mask(_mm512_xor_si512(keys[k], shifted[k]), pair)} << (8 * k);
        }
        even += kGroup - __builtin_popcount(odd);
        const __m512i yz = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(keys[0])),
                                              _mm512_cvtepi64_epi32(keys[1]), 1);
        low = _mm512_min_epu16(low, yz);
        high = _mm512_max_epu16(high, yz);
        const __m512i parent = _mm512_and_si512(_mm512_srlv_epi16(yz, halves), within);
        const __m512i place = _mm512_madd_epi16(parent, strides), parity = _mm512_and_si512(yz, halves);
        const __m512i octant = _mm512_or_si512(_mm512_srli_epi32(parity, 15), parity);
        const __m512i first =
            _mm512_mask_blend_epi32(static_cast<__mmask16>(odd), _mm512_set1_epi32(1), _mm512_set1_epi32(1 << 4));
        const __m512i bit = _mm512_sllv_epi32(first, _mm512_and_si512(octant, _mm512_set1_epi32(3)));
        const __m512i own = _mm512_or_si512(_mm512_slli_epi32(place, 8), bit);
        const __m512i mark = _mm512_mask_or_epi32(own, static_cast<__mmask16>(second), own, _mm512_srli_epi32(bit, 1));
        const __mmask16 kept = static_cast<__mmask16>(~second);  // of the marks before these
        _mm512_storeu_si512(marks + n, _mm512_maskz_compress_epi32(kept, _mm512_alignr_epi32(mark, last_mark, 15)));
        n += __builtin_popcount(kept);
        last_mark = mark;
      }
      for (int64_t k = 0; k < n; ++k) mark(marks[k]);
    }
    mark(static_cast<uint32_t>(((Vec<int32_t, 16>)last_mark)[15]));
    descents |= not_greater;
    before = last[7];
    for (int k = 0; k < 16; k += kRow) {
      Row part = {};
      for (int l = 0; l < kRow; ++l) part[l] = static_cast<uint32_t>(((Vec<int32_t, 16>)any)[k + l]);
      all |= part;
    }
    for (int k = 0; k < 32; ++k) {
      const uint32_t a = static_cast<uint16_t>(((Vec<int16_t, 32>)low)[k]);
      const uint32_t b = static_cast<uint16_t>(((Vec<int16_t, 32>)high)[k]);
      const int column = k % 2 == 0 ? 3 : 2;
      least[column] = a < least[column] ? a : least[column];
      most[column] = b > most[column] ? b : most[column];
    }
    return row;
  }
#else
  int64_t many(int64_t row, int64_t) { return row; }
#endif

  OctantRows finish(int64_t end) const {
    OctantRows rows{end, even, descents == 0 && all[0] < kMaxBatch && (all[1] | all[2] | all[3]) < kMaxCoord, {}, {}};
    for (int k = 0; k < 2; ++k) {
      rows.low[k] = least[2 + k] >> map.half[1 + k];
      rows.high[k] = most[2 + k] >> map.half[1 + k];
    }
    return rows;
  }
};

OctantRows mark(const OctantMap& map, const int32_t* coords, int64_t begin, int64_t end, uint64_t limit) {
  // The first row of all compares with nothing: as if a smaller one came before it.
  const int64_t before = begin > 0 ? static_cast<int64_t>(key_of(coords + kRow * (begin - 1))) : -1;
  Marker marker{map, coords, limit, before};
  int64_t row = marker.many(begin, end);
  Marker last = marker;  // in registers
  while (row < end && last.one(row)) ++row;
  return last.finish(row);
}

// --- listing ---------------------------------------------------------------------------------------------------------

// A bit for each of 64 bytes that is not zero.
inline uint64_t nonzero(const uint8_t* bytes) {
#if defined(CVC_SIMD_AVX512)
  const __m512i all = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(all, all);
#elif defined(__SSE2__)
  uint64_t bits = 0;
  for (int k = 0; k < 4; ++k) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * k));
    const int zero = _mm_movemask_epi8(_mm_cmpeq_epi8(part, _mm_setzero_si128()));
    bits |= static_cast<uint64_t>(static_cast<uint16_t>(~zero)) << (16 * k);
  }
  return bits;
#else
  uint64_t bits = 0;
  for (int k = 0; k < 64; ++k) bits |= static_cast<uint64_t>(bytes[k] != 0) << k;
  return bits;
#endif
}

void list(const OctantMap& given, const OctantRows& rows, OctantSlab* slab, OctantLine* lines, uint16_t* z,
          uint8_t* children) {
  const OctantMap map = given;
  const uint32_t z_begin = rows.low[1] & ~63u, z_end = rows.high[1] + 1;
  int64_t n = 0, l = 0;
  for (uint32_t y = rows.low[0]; y <= rows.high[0]; ++y) {
    uint8_t* const line = map.children + (y & (map.lines - 1)) * map.width;
    const int64_t before = n;
    for (uint32_t first = z_begin; first < z_end; first += 64) {
      uint8_t* const bytes = line + (first & (map.width - 1));
      uint64_t bits = nonzero(bytes);
      if (bits == 0) continue;
      const int count = __builtin_popcountll(bits);
      // Four at a time, though the last may be none: fewer branches that nobody foresees.
      for (int k = 0; k < count; k += 4)
        for (int j = 0; j < 4; ++j) {
          const uint32_t at = bits ? static_cast<uint32_t>(__builtin_ctzll(bits)) : 63;
          z[n + k + j] = static_cast<uint16_t>(first + at);
          children[n + k + j] = bytes[at];
          bits &= bits - 1;
        }
      n += count;
      __builtin_memset(bytes, 0, 64);
    }
    lines[l] = {static_cast<int32_t>(y), static_cast<uint32_t>(n - before)};
    l += n > before;
  }
  slab->lines = l;
  slab->parents = n;
}

constexpr OctantKernels kKernels{mark, list};

}  // namespace

const OctantKernels* CVC_ISA_NAME(octant_kernels)() { return &kKernels; }

}  // namespace cvc::voxels
