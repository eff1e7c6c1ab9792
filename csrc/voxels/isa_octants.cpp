// Parents of eight children, compiled once per instruction set (common/isa.h).
//
// Rows are in order, so those that go to a line of parents are four streams, one for every x and y of children, each of
// consecutive rows. From which children a parent has follows how many rows it takes from each: nothing is looked up,
// every feature is read once, and a parent is summed in registers and written once, past the caches.
#include "common/isa.h"
#include "common/simd.h"
#include "voxels/octants.h"

namespace cvc::voxels {
namespace {

// --- marking ---------------------------------------------------------------------------------------------------------

// One by one. Neighbours share a byte, whose next bit has to wait for the last one: four stretches take turns.
inline void mark_rows(const OctantMap& map, const int32_t* coords, int64_t begin, int64_t end, int child) {
  const int half_y = map.half_y, half_z = map.half_z, first_bit = 4 * child;
  const int32_t corner_y = map.y << half_y, corner_z = map.z << half_z, width = static_cast<int32_t>(map.width);
  uint8_t* const children = map.children;
  const auto one = [=](int64_t row) {
    const int32_t y = coords[4 * row + 2] - corner_y, z = coords[4 * row + 3] - corner_z;
    const int octant = first_bit + 2 * (y & half_y) + (z & half_z);
    children[(y >> half_y) * width + (z >> half_z)] |= static_cast<uint8_t>(1 << octant);
  };
  const int64_t quarter = (end - begin) / 4;
  for (int64_t row = begin; row < begin + quarter; ++row)
    for (int k = 0; k < 4; ++k) one(row + k * quarter);
  for (int64_t row = begin + 4 * quarter; row < end; ++row) one(row);
}

void mark(const OctantMap& given, const int32_t* coords, int64_t begin, int64_t end, int child) {
  const OctantMap map = given;  // which no store can change
  int64_t row = begin;
#if defined(CVC_SIMD_AVX512)
  // Sixteen rows at a time as (cell << 8 | bit). Of two neighbours along z with one parent only the second is marked,
  // for both.
  constexpr int64_t kGroup = 16, kBlock = 32 * kGroup;
  uint32_t marks[kBlock + kGroup];
  alignas(64) uint16_t order[32] = {};
  for (int k = 0; k < 8; ++k) {
    order[2 * k] = static_cast<uint16_t>(8 * k + 6);      // z
    order[2 * k + 1] = static_cast<uint16_t>(8 * k + 4);  // y
  }
  const __m512i yz = _mm512_load_si512(order);
  const auto both = [](int32_t y, int32_t z) {
    return _mm512_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(y) << 16 | static_cast<uint32_t>(z)));
  };
  const __m512i corner = both(map.y << map.half_y, map.z << map.half_z);
  const __m512i halves = both(map.half_y, map.half_z), strides = both(static_cast<int32_t>(map.width), 1);
  const __m512i first = _mm512_set1_epi32(1 << (4 * child)), pair = _mm512_set1_epi32(map.half_z);
  __m512i last_yz = _mm512_set1_epi32(-1), last_mark = _mm512_setzero_si512();
  while (end - row >= kGroup) {
    int64_t n = 0;
    for (const int64_t stop = end - row < kBlock ? end : row + kBlock; stop - row >= kGroup; row += kGroup) {
      const int32_t* const at = coords + 4 * row;
      const __m512i low = _mm512_permutex2var_epi16(_mm512_loadu_si512(at), yz, _mm512_loadu_si512(at + 16));
      const __m512i high = _mm512_permutex2var_epi16(_mm512_loadu_si512(at + 32), yz, _mm512_loadu_si512(at + 48));
      const __m512i place = _mm512_sub_epi16(_mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1), corner);
      const __m512i cell = _mm512_madd_epi16(_mm512_srlv_epi16(place, halves), strides);
      const __m512i parity = _mm512_and_si512(place, halves);
      const __m512i octant = _mm512_or_si512(_mm512_srli_epi32(parity, 15), parity);
      const __m512i bit = _mm512_sllv_epi32(first, _mm512_and_si512(octant, _mm512_set1_epi32(3)));
      const __m512i own = _mm512_or_si512(_mm512_slli_epi32(cell, 8), bit);
      const __m512i before = _mm512_alignr_epi32(place, last_yz, 15);
      const __mmask16 second = _mm512_cmpeq_epi32_mask(_mm512_xor_si512(place, before), pair);
      // The mark before, as yet without what came before it: a first one of two has nothing there.
      const __m512i mark = _mm512_mask_or_epi32(own, second, own, _mm512_srli_epi32(bit, 1));
      const __m512i done = _mm512_alignr_epi32(mark, last_mark, 15);
      const __mmask16 kept = static_cast<__mmask16>(~second);
      _mm512_storeu_si512(marks + n, _mm512_maskz_compress_epi32(kept, done));
      n += __builtin_popcount(kept);
      last_yz = place;
      last_mark = mark;
    }
    for (int64_t k = 0; k < n; ++k) map.children[marks[k] >> 8] |= static_cast<uint8_t>(marks[k]);
  }
  const uint32_t mark = static_cast<uint32_t>(((Vec<int32_t, 16>)last_mark)[15]);
  map.children[mark >> 8] |= static_cast<uint8_t>(mark);
#endif
  mark_rows(map, coords, row, end, child);
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

void list(const OctantMap& given, OctantSlab* slab, OctantLine* lines, uint16_t* z, uint8_t* children) {
  const OctantMap map = given;
  int64_t n = 0, l = 0;
  for (int64_t line = 0; line < map.lines; ++line) {
    const int64_t before = n;
    for (int64_t w = 0; w < map.width; w += 64) {
      uint8_t* const bytes = map.children + line * map.width + w;
      uint64_t bits = nonzero(bytes);
      const int count = __builtin_popcountll(bits);
      const int32_t first = map.z + static_cast<int32_t>(w);
      // Four at a time, though the last may be none: fewer branches that nobody foresees.
      for (int k = 0; k < count; k += 4)
        for (int j = 0; j < 4; ++j) {
          const int at = bits ? __builtin_ctzll(bits) : 63;
          z[n + k + j] = static_cast<uint16_t>(first + at);
          children[n + k + j] = bytes[at];
          bits &= bits - 1;
        }
      n += count;
      __builtin_memset(bytes, 0, 64);
    }
    lines[l] = {map.y + static_cast<int32_t>(line), static_cast<uint32_t>(n - before)};
    l += n > before;
  }
  slab->lines = l;
  slab->parents = n;
}

// --- writing ---------------------------------------------------------------------------------------------------------

constexpr int kStreams = 4, kOctants = 8;

// How many rows of each stream, of x and y of children, go to the n parents.
inline void count_streams(const uint8_t* children, int64_t n, int64_t* counts) {
  for (int s = 0; s < kStreams; ++s) counts[s] = 0;
  for (int64_t k = 0; k < n; k += 8) {
    uint64_t eight;
    __builtin_memcpy(&eight, children + k, 8);
    if (n - k < 8) eight &= (uint64_t{1} << (8 * (n - k))) - 1;
    for (int s = 0; s < kStreams; ++s)
      counts[s] += __builtin_popcountll(eight & uint64_t{0x0303030303030303} << (2 * s));
  }
}

// The next rows of all streams.
struct Streams {
#if defined(CVC_SIMD_AVX512)
  __m256i rows;  // of two lanes each
  explicit Streams(const int64_t* row) {
    uint32_t lanes[kOctants];
    for (int k = 0; k < kOctants; ++k) lanes[k] = static_cast<uint32_t>(row[k / 2]);
    rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
  }
  // Writes the rows of a parent, and what lies behind them.
  void take(uint32_t children, uint32_t* list) {
    const __m256i one = _mm256_set1_epi32(1);
    const uint32_t even = children & 0x55, odd = children >> 1 & 0x55;
    const __m256i own = _mm256_mask_add_epi32(rows, static_cast<__mmask8>(2 * even), rows, one);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(list),
                        _mm256_maskz_compress_epi32(static_cast<__mmask8>(children), own));
    rows = _mm256_mask_add_epi32(rows, static_cast<__mmask8>(3 * even), rows, one);
    rows = _mm256_mask_add_epi32(rows, static_cast<__mmask8>(3 * odd), rows, one);
  }
#else
  uint32_t rows[kStreams];
  explicit Streams(const int64_t* row) {
    for (int s = 0; s < kStreams; ++s) rows[s] = static_cast<uint32_t>(row[s]);
  }
  void take(uint32_t children, uint32_t* list) {
#pragma GCC unroll 8
    for (int k = 0; k < kOctants; ++k) {
      const uint32_t there = children >> k & 1;
      *list = rows[k / 2];
      list += there;
      rows[k / 2] += there;
    }
  }
#endif
};

// Past the caches: the lines need not be fetched first.
template <class T, class V>
inline void stream(T* to, V v) {
#if defined(CVC_SIMD_AVX512)
  if constexpr (sizeof v == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
    return;
  }
#endif
#if defined(__SSE2__)
  for (size_t b = 0; b < sizeof v; b += 16) {
    __m128i part;
    __builtin_memcpy(&part, reinterpret_cast<const char*>(&v) + b, 16);
    _mm_stream_si128(reinterpret_cast<__m128i*>(reinterpret_cast<char*>(to) + b), part);
  }
#else
  store(to, v);
#endif
}
inline void stream(int64_t* to, int64_t number) {
#if defined(__SSE2__)
  _mm_stream_si64(reinterpret_cast<long long*>(to), number);
#else
  *to = number;
#endif
}
inline void stream(const uint32_t* numbers, int64_t n, int64_t add, int64_t* to) {
  int64_t k = 0;
#if defined(CVC_SIMD_AVX512)
  for (; k < n && reinterpret_cast<uintptr_t>(to + k) % 64 != 0; ++k) to[k] = add + numbers[k];
  for (; n - k >= 8; k += 8) {
    const __m512i wide = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers + k)));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + k), _mm512_add_epi64(wide, _mm512_set1_epi64(add)));
  }
#endif
  for (; k < n; ++k) to[k] = add + numbers[k];
}

// The processor fetches ahead by itself, but not into the next page. Into the second level, which waits for more lines
// at a time than the first. Nothing is read behind the rows: it is only asked for.
constexpr int64_t kAhead = 16384;

template <bool kMax, class V>
inline V join(V sum, V row) {
  if constexpr (kMax) {
    return (row > sum) | (row != row) ? row : sum;
  } else {
    return sum + row;
  }
}

// How the rows of a parent become one; and every row is told its parent.
template <class T>
struct Joining {
  const T* rows;
  T* out;
  int64_t channels;
  T first;
  bool is_mean, from_zero;
  uint32_t* parent_of;
};

// Of channels c … as many vectors as stay in registers at a time; returns behind which.
template <class V, int kVectors, bool kMax, bool kStream, class T>
inline int64_t join_vectors(const Joining<T>& by, const uint32_t* list, uint32_t n, int64_t c, uint32_t parent,
                            T* out) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(T);
  for (; c + kVectors * kLanes <= by.channels; c += kVectors * kLanes) {
    V sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = V{} + by.first;
    for (uint32_t k = 0; k < n; ++k) {
      const T* const row = by.rows + list[k] * by.channels + c;
      if (c == 0) by.parent_of[list[k]] = parent;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        if (v * sizeof(V) % 64 == 0) __builtin_prefetch(reinterpret_cast<const char*>(row + v * kLanes) + kAhead, 0, 2);
        sums[v] = join<kMax>(sums[v], load<V>(row + v * kLanes));
      }
    }
    const T divisor = static_cast<T>(n + by.from_zero);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const V result = by.is_mean ? sums[v] / divisor : sums[v];
      if constexpr (kStream && sizeof(V) == kVectorBytes) {
        stream(out + c + v * kLanes, result);
      } else {
        store(out + c + v * kLanes, result);
      }
    }
  }
  return c;
}

template <bool kMax, bool kStream, class T>
inline void join_rows(const Joining<T>& by, const uint32_t* list, uint32_t n, uint32_t parent, T* out) {
  int64_t c = join_vectors<Vec<T>, 8, kMax, kStream>(by, list, n, 0, parent, out);
  c = join_vectors<Vec<T>, 4, kMax, kStream>(by, list, n, c, parent, out);
  c = join_vectors<Vec<T>, 2, kMax, kStream>(by, list, n, c, parent, out);
  c = join_vectors<Vec<T>, 1, kMax, kStream>(by, list, n, c, parent, out);
  if constexpr (kVectorBytes > 16)
    c = join_vectors<Vec<T, 16 / sizeof(T)>, 1, kMax, kStream>(by, list, n, c, parent, out);
  join_vectors<Vec<T, 1>, 1, kMax, kStream>(by, list, n, c, parent, out);
}

struct Slab {
  const OctantSlab slab;
  const OctantLine* lines;
  const uint16_t* z;
  const uint8_t* children;
  int64_t first;
  const OctantOutputs out;
  uint32_t* parent_of;
};

// Without features. Every stream tells two rows their parent, and where one of them is not its own, tells it again or
// leaves it to the stream that comes next: rows are told in order.
void write_maps(const Slab& given) {
  const Slab s = given;
  for (int p = 0; p < 2; ++p) {
    const uint8_t* children = s.children;
    uint32_t* to = s.parent_of + s.slab.planes[p];
    uint32_t parent = 0;
    for (int64_t l = 0; l < s.slab.lines; ++l) {
      const uint32_t count = s.lines[l].count;
      for (int shift = 4 * p; shift < 4 * p + 4; shift += 2)
        for (uint32_t k = 0; k < count; ++k) {
          const uint32_t there = children[k] >> shift & 3;
          to[0] = to[1] = parent + k;
          to += (there & 1) + (there >> 1);
        }
      parent += count;
      children += count;
    }
  }
  int64_t parent = 0;
  for (int64_t l = 0; l < s.slab.lines; ++l) {
    Vec<int32_t, 4> voxel = {s.slab.batch, s.slab.x, s.lines[l].y, 0};
    for (const int64_t end = parent + s.lines[l].count; parent < end; ++parent) {
      voxel[3] = s.z[parent];
      stream(s.out.coords + 4 * (s.first + parent), voxel);
      stream(s.out.counts + s.first + parent, static_cast<int64_t>(__builtin_popcount(s.children[parent])));
    }
  }
}

template <class T, bool kMax, bool kStream>
void write(const Slab& given) {
  const Slab s = given;
  const OctantFeatures& f = s.out.features;
  const T nothing = kMax && !f.from_zero ? -static_cast<T>(__builtin_inff()) : T(0);
  const Joining<T> by{
      static_cast<const T*>(f.rows), static_cast<T*>(f.out), f.channels, nothing, f.is_mean, f.from_zero, s.parent_of};
  const uint8_t* children = s.children;
  const uint16_t* z = s.z;
  int64_t plane[2] = {s.slab.planes[0], s.slab.planes[1]}, parent = s.first;
  for (int64_t l = 0; l < s.slab.lines; ++l) {
    const int64_t count = s.lines[l].count;
    int64_t of[kStreams];
    count_streams(children, count, of);
    const int64_t rows[kStreams] = {plane[0], plane[0] + of[0], plane[1], plane[1] + of[2]};
    plane[0] += of[0] + of[1];
    plane[1] += of[2] + of[3];
    Streams streams(rows);
    Vec<int32_t, 4> voxel = {s.slab.batch, s.slab.x, s.lines[l].y, 0};
    for (int64_t k = 0; k < count; ++k, ++parent) {
      uint32_t list[kOctants];
      const uint32_t there = children[k], n = static_cast<uint32_t>(__builtin_popcount(there));
      streams.take(there, list);
      voxel[3] = z[k];
      stream(s.out.coords + 4 * parent, voxel);
      stream(s.out.counts + parent, static_cast<int64_t>(n));
      const uint32_t own = static_cast<uint32_t>(parent - s.first);
      join_rows<kMax, kStream>(by, list, n, own, by.out + parent * by.channels);
    }
    z += count;
    children += count;
  }
}

template <class T, bool kMax>
void write(const Slab& slab) {
  const OctantFeatures& f = slab.out.features;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(f.out) | static_cast<uintptr_t>(f.channels * sizeof(T));
  f.large&& bits % 64 == 0 ? write<T, kMax, true>(slab) : write<T, kMax, false>(slab);
}

void write(const OctantSlab& slab, const OctantLine* lines, const uint16_t* z, const uint8_t* children, int64_t first,
           const OctantOutputs& out, uint32_t* scratch) {
  const Slab all{slab, lines, z, children, first, out, scratch - slab.begin};
  if (out.features.channels == 0) {
    write_maps(all);
  } else if (out.features.is_double) {
    out.features.is_max ? write<double, true>(all) : write<double, false>(all);
  } else {
    out.features.is_max ? write<float, true>(all) : write<float, false>(all);
  }
  stream(scratch, slab.end - slab.begin, first, out.inverse + slab.begin);
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

constexpr OctantKernels kKernels{mark, list, write};

}  // namespace

const OctantKernels* CVC_ISA_NAME(octant_kernels)() { return &kKernels; }

}  // namespace cvc::voxels
