// Vectors of features that are joined and written. For files that are compiled once per instruction set alone:
// everything has internal linkage.
#pragma once

#include "common/simd.h"

namespace cvc::voxels {
namespace {

template <bool kMax, class V>
inline V join(V sum, V row) {
  if constexpr (kMax) {
    return (row > sum) | (row != row) ? row : sum;
  } else {
    return sum + row;
  }
}

// Writes past the caches: the lines need not be fetched first.
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

}  // namespace
}  // namespace cvc::voxels
