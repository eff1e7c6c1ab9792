// Writes the parents of eight children, compiled once per instruction set (common/isa.h).
//
// Rows are in order, so those that go to a line of parents are four streams, one for every x and y of children, each of
// consecutive rows. From which children a parent has follows how many rows it takes from each: nothing is looked up,
// every feature is read once, and a parent is summed in registers and written once, past the caches.
#include "common/isa.h"
#include "common/simd.h"
#include "voxels/join_vectors.h"
#include "voxels/octants.h"

namespace cvc::voxels {
namespace {

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

// Past the caches.
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
        if (v * sizeof(V) % 64 == 0) fetch_ahead(row + v * kLanes);
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

}  // namespace

void CVC_ISA_NAME(write_octants)(const OctantSlab& slab, const OctantLine* lines, const uint16_t* z,
                                 const uint8_t* children, int64_t first, const OctantOutputs& out, uint32_t* scratch) {
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

}  // namespace cvc::voxels
