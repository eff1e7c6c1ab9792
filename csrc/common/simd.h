// Small SIMD helpers over GCC vector extensions, for isa_*.cpp only: everything has internal linkage.
//
// kWidth<T> is the native number of lanes. Arithmetic, comparisons and `mask ? a : b` are the compiler's; min and max
// written as `a < b ? a : b` become one instruction.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// CVC_SIMD_BYTES asks for vectors wider than the machine's, of generic code: so the tests run 16 lanes without AVX-512.
#if defined(CVC_SIMD_BYTES)
constexpr int kVectorBytes = CVC_SIMD_BYTES;
#define CVC_SIMD_GENERIC
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#define CVC_SIMD_AVX512
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#define CVC_SIMD_AVX2
#else
constexpr int kVectorBytes = 16;
#if defined(__SSE4_2__)
#define CVC_SIMD_SSE
#else
#define CVC_SIMD_GENERIC
#endif
#endif

template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
  typedef T unaligned __attribute__((vector_size(sizeof(T) * N), aligned(sizeof(T)), may_alias));
};
template <class T, int N = kWidth<T>>
using Vec = typename VectorOf<T, N>::type;

template <class V, class T>
inline V load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T, sizeof(V) / sizeof(T)>::unaligned*>(p);
}
template <class V, class T>
inline void store(T* p, V v) {
  *reinterpret_cast<typename VectorOf<T, sizeof(V) / sizeof(T)>::unaligned*>(p) = v;
}

// The processor fetches ahead by itself, but not into the next page. Into the second level, which waits for more lines
// at a time than the first. Nothing is read behind the rows: it is only asked for. Always inline: the compiler drops
// calls of functions that do nothing but prefetch.
template <class T>
[[gnu::always_inline]] inline void fetch_ahead(const T* p) {
  constexpr int64_t kAhead = 16384;
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead, 0, 2);
}

using F = Vec<float>;
using I = Vec<int32_t>;
constexpr int kF = kWidth<float>;

// The signed integers as wide as T.
template <class T>
struct IntegerLike {
  using type = int32_t;
};
template <>
struct IntegerLike<double> {
  using type = int64_t;
};

inline F vmin(F a, F b) { return a < b ? a : b; }
inline F vmax(F a, F b) { return a < b ? b : a; }
inline double root(double a) { return __builtin_sqrt(a); }
inline F root(F a) {
#if defined(CVC_SIMD_AVX512)
  return _mm512_sqrt_ps(a);
#elif defined(CVC_SIMD_AVX2)
  return _mm256_sqrt_ps(a);
#elif defined(CVC_SIMD_SSE)
  return _mm_sqrt_ps(a);
#else
  for (int l = 0; l < kF; ++l) a[l] = __builtin_sqrtf(a[l]);
  return a;
#endif
}
inline F vabs(F a) { return F(I(a) & 0x7fffffff); }

// Four lanes at a time: three floats per lane, as columns; to doubles and back; and joined to native vectors.
using F4 = Vec<float, 4>;
using D4 = Vec<double, 4>;
using I4 = Vec<int32_t, 4>;

// (p[0], p[1], p[2], 0), reading no more.
inline F4 load3(const float* p) {
#if defined(__AVX2__)
  return _mm_maskload_ps(p, _mm_setr_epi32(-1, -1, -1, 0));
#elif defined(__SSE2__)
  return _mm_movelh_ps(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), _mm_load_ss(p + 2));
#else
  return F4{p[0], p[1], p[2], 0};
#endif
}
inline D4 widen(F4 v) {
#if defined(__AVX2__)
  return _mm256_cvtps_pd(v);
#else
  return __builtin_convertvector(v, D4);
#endif
}
inline F4 narrow(D4 v) {
#if defined(__AVX2__)
  return _mm256_cvtpd_ps(v);
#else
  return __builtin_convertvector(v, F4);
#endif
}
// Toward zero; what no int32_t holds becomes one that is far from 0.
inline I4 truncate(D4 v) {
#if defined(__AVX2__)
  return (I4)_mm256_cvttpd_epi32(v);
#elif defined(__SSE2__)
  const __m128d half[2] = {_mm_setr_pd(v[0], v[1]), _mm_setr_pd(v[2], v[3])};
  return (I4)_mm_unpacklo_epi64(_mm_cvttpd_epi32(half[0]), _mm_cvttpd_epi32(half[1]));
#else
  I4 whole{};
  for (int l = 0; l < 4; ++l)
    whole[l] = v[l] > -2147483647.0 && v[l] < 2147483647.0 ? static_cast<int32_t>(v[l]) : INT32_MIN;
  return whole;
#endif
}
inline F join(const F4* part) {
  if constexpr (kF == 4) {
    return *reinterpret_cast<const F*>(part);
  } else if constexpr (kF == 8) {
    const auto v = __builtin_shufflevector(part[0], part[1], 0, 1, 2, 3, 4, 5, 6, 7);
    return *reinterpret_cast<const F*>(&v);
  } else {
    const auto low = __builtin_shufflevector(part[0], part[1], 0, 1, 2, 3, 4, 5, 6, 7);
    const auto high = __builtin_shufflevector(part[2], part[3], 0, 1, 2, 3, 4, 5, 6, 7);
    const auto v = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return *reinterpret_cast<const F*>(&v);
  }
}

inline I join(const I4* part) {
  F4 same[kF / 4];
  for (int k = 0; k < kF / 4; ++k) same[k] = F4(part[k]);
  return I(join(same));
}

// One bit per lane of a comparison's result.
inline unsigned lane_bits(I mask) {
#if defined(CVC_SIMD_AVX512)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(CVC_SIMD_AVX2)
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)mask));
#elif defined(CVC_SIMD_SSE)
  return static_cast<unsigned>(_mm_movemask_ps((__m128)mask));
#else
  unsigned bits = 0;
  for (int l = 0; l < kF; ++l) bits |= static_cast<unsigned>(mask[l] & 1) << l;
  return bits;
#endif
}

inline bool any_lane(bool mask) { return mask; }
inline bool any_lane(I mask) { return lane_bits(mask) != 0; }

// The selected lanes moved to the front, in order. `Packer` holds what several vectors with one selection share.
#if defined(CVC_SIMD_AVX512)
struct Packer {
  __mmask16 bits;
  explicit Packer(unsigned b) : bits(static_cast<__mmask16>(b)) {}
  I operator()(I v) const { return (I)_mm512_maskz_compress_epi32(bits, (__m512i)v); }
};
#elif defined(CVC_SIMD_AVX2)
struct PackTable {
  uint64_t order[256];
  constexpr PackTable() : order{} {
    for (int bits = 0; bits < 256; ++bits)
      for (int lane = 0, at = 0; lane < 8; ++lane)
        if (bits >> lane & 1) order[bits] |= static_cast<uint64_t>(lane) << (8 * at++);
  }
};
constexpr PackTable kPackTable;
struct Packer {
  __m256i order;
  explicit Packer(unsigned bits)
      : order(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&kPackTable.order[bits]))) {}
  I operator()(I v) const { return (I)_mm256_permutevar8x32_epi32((__m256i)v, order); }
};
#elif defined(CVC_SIMD_SSE)
struct PackTable {
  uint8_t order[16][16];
  constexpr PackTable() : order{} {
    for (int bits = 0; bits < 16; ++bits)
      for (int lane = 0, at = 0; lane < 4; ++lane)
        if (bits >> lane & 1)
          for (int byte = 0; byte < 4; ++byte) order[bits][at++] = static_cast<uint8_t>(4 * lane + byte);
  }
};
constexpr PackTable kPackTable;
struct Packer {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  Bytes order;
  explicit Packer(unsigned bits) : order(load<Bytes>(kPackTable.order[bits])) {}
  I operator()(I v) const { return (I)__builtin_shuffle((Bytes)v, order); }
};
#else
struct Packer {
  unsigned bits;
  explicit Packer(unsigned b) : bits(b) {}
  I operator()(I v) const {
    I packed{};
    for (int l = 0, to = 0; l < kF; ++l)
      if (bits >> l & 1) packed[to++] = v[l];
    return packed;
  }
};
#endif
inline F pack(const Packer& p, F v) { return F(p(I(v))); }

// table[index] of 32 numbers, by lane.
inline F look_up32(const float* table, I index) {
#if defined(CVC_SIMD_AVX512)
  return _mm512_permutex2var_ps(load<F>(table), (__m512i)index, load<F>(table + 16));
#elif defined(CVC_SIMD_AVX2)
  const __m256i at = (__m256i)index;  // a gather takes twice as long
  const __m256 odd = (__m256)_mm256_slli_epi32(at, 28), upper = (__m256)_mm256_slli_epi32(at, 27);
  __m256 part[4];
  for (int k = 0; k < 4; ++k) part[k] = _mm256_permutevar8x32_ps(load<F>(table + 8 * k), at);
  return _mm256_blendv_ps(_mm256_blendv_ps(part[0], part[1], odd), _mm256_blendv_ps(part[2], part[3], odd), upper);
#else
  F found;
  for (int l = 0; l < kF; ++l) found[l] = table[index[l]];
  return found;
#endif
}
// Bytes as numbers.
inline I widen(const uint8_t* p) {
  typedef uint8_t Bytes __attribute__((vector_size(kF)));
  return __builtin_convertvector(load<Bytes>(p), I);
}

// All lanes combined to one number.
template <int step = kF / 2, class Combine>
inline float fold(F v, Combine combine) {
  if constexpr (step > 0) {
    I turned{};
#pragma GCC unroll 16
    for (int l = 0; l < kF; ++l) turned[l] = (l + step) % kF;
    return fold<step / 2>(combine(v, F(__builtin_shuffle(v, turned))), combine);
  } else {
    return v[0];
  }
}
inline float greatest(F v) {
  return fold(v, [](F a, F b) { return vmax(a, b); });
}
// The first of the lanes with the least value; no lane may be NaN.
inline int least_lane(F v) { return __builtin_ctz(lane_bits(v == -greatest(-v))); }

// Transposes the kF × kF matrix of v[0..kF): element l of v[k] becomes element k of v[l].
template <int step = 1>
inline void transpose(F* v) {
  if constexpr (step < kF) {
    I low{}, high{};  // lanes of (a, b): those of a and b without the bit `step`, those with it
#pragma GCC unroll 16
    for (int l = 0; l < kF; ++l) {
      low[l] = (l & step) ? kF + l - step : l;
      high[l] = (l & step) ? kF + l : l + step;
    }
#pragma GCC unroll 16
    for (int k = 0; k < kF; ++k) {
      if (k & step) continue;
      const F a = v[k], b = v[k + step];
      v[k] = __builtin_shuffle(a, b, low);
      v[k + step] = __builtin_shuffle(a, b, high);
    }
    transpose<2 * step>(v);
  }
}

}  // namespace
