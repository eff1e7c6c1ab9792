// Vector mathematics for isa_*.cpp only: everything has internal linkage.
#pragma once

#include "common/simd.h"

namespace {

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

inline Vec<float> floor_of(Vec<float> x) {
#if defined(CVC_SIMD_AVX512)
  return _mm512_floor_ps(x);
#elif defined(CVC_SIMD_AVX2)
  return _mm256_floor_ps(x);
#elif defined(CVC_SIMD_SSE)
  return _mm_floor_ps(x);
#else
  for (int l = 0; l < kWidth<float>; ++l) x[l] = __builtin_floorf(x[l]);
  return x;
#endif
}
inline Vec<double> floor_of(Vec<double> x) {
#if defined(CVC_SIMD_AVX512)
  return _mm512_floor_pd(x);
#elif defined(CVC_SIMD_AVX2)
  return _mm256_floor_pd(x);
#elif defined(CVC_SIMD_SSE)
  return _mm_floor_pd(x);
#else
  for (int l = 0; l < kWidth<double>; ++l) x[l] = __builtin_floor(x[l]);
  return x;
#endif
}

inline float exp_of(float x) { return __builtin_expf(x); }
inline double exp_of(double x) { return __builtin_exp(x); }
inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

// e^x to 1 ulp or so; 0 below the normal range. Keeps NaN.
inline Vec<float> exp_of(Vec<float> x) {
  const Vec<float> low = broadcast(-87.3f), high = broadcast(88.7f);
  const Vec<float> bounded = x < low ? low : (x > high ? high : x);
  const Vec<float> n = floor_of(bounded * 1.44269504f + 0.5f);
  const Vec<float> r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec<int32_t> power = (__builtin_convertvector(n, Vec<int32_t>) + 127) << 23;
  return x < low ? Vec<float>{} : p * (Vec<float>)power;
}
inline Vec<double> exp_of(Vec<double> x) {
  for (int l = 0; l < kWidth<double>; ++l) x[l] = __builtin_exp(x[l]);
  return x;
}

}  // namespace
