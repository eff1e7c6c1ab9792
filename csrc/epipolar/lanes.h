// Vector mathematics for the epipolar kernels, for isa_*.cpp only: everything has internal linkage.
#pragma once

#include "common/lanes.h"
#include "epipolar/job.h"

namespace cvc::epipolar {
namespace {

template <class T>
using Mask = Vec<typename IntegerLike<T>::type, kWidth<T>>;

inline Vec<float> root_of(Vec<float> x) { return root(x); }
inline Vec<double> root_of(Vec<double> x) {
  for (int l = 0; l < kWidth<double>; ++l) x[l] = __builtin_sqrt(x[l]);
  return x;
}

template <class T>
inline T sum_of(Vec<T> v) {
  T sum = v[0];
  for (int l = 1; l < kWidth<T>; ++l) sum += v[l];
  return sum;
}
template <>
inline float sum_of<float>(Vec<float> v) {
#if defined(CVC_SIMD_AVX512)
  return _mm512_reduce_add_ps(v);
#elif defined(CVC_SIMD_AVX2)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// The normal distribution's Phi(x), and e^(-x²/2). The polynomial in 1 / (1 + 0.21 |x|) is a weighted least-squares
// fit of erfcx(|x| / √2) / 2 with a relative error of 1.7e-8 on [0, 14].
inline Vec<float> normal_cdf(Vec<float> x, Vec<float>* bell) {
  const Vec<float> size = vabs(x), s = 1.0f / (1.0f + 0.21f * size);
  *bell = exp_of(-0.5f * x * x);
  Vec<float> p = broadcast(-0.07166172610605481f);
  p = p * s + 0.2836153075907872f;
  p = p * s - 0.3303098180515663f;
  p = p * s + 0.34946741081310595f;
  p = p * s - 0.09397277954791258f;
  p = p * s + 0.12489394720979076f;
  p = p * s + 0.0691864231201402f;
  p = p * s + 0.08506972099604884f;
  p = p * s + 0.08371152067750293f;
  const Vec<float> tail = *bell * (p * s);
  return x < 0.0f ? tail : 1.0f - tail;
}
inline Vec<double> normal_cdf(Vec<double> x, Vec<double>* bell) {
  Vec<double> phi;
  for (int l = 0; l < kWidth<double>; ++l) {
    phi[l] = 0.5 * __builtin_erfc(-0.70710678118654752440 * x[l]);
    (*bell)[l] = __builtin_exp(-0.5 * x[l] * x[l]);
  }
  return phi;
}

// act(x), and its derivative when asked for.
template <Activation kActivation, bool kSlope, class T>
inline Vec<T> activate(Vec<T> x, Vec<T>* slope) {
  using V = Vec<T>;
  if constexpr (kActivation == Activation::relu) {
    if constexpr (kSlope) *slope = x <= T(0) ? V{} : broadcast(T(1));
    return x <= T(0) ? V{} : x;  // keeps NaN
  } else if constexpr (kActivation == Activation::gelu) {
    V bell;
    const V phi = normal_cdf(x, &bell);
    if constexpr (kSlope) *slope = phi + x * bell * T(0.39894228040143267794);
    return x * phi;
  } else if constexpr (kActivation == Activation::silu) {
    const V sigmoid = T(1) / (T(1) + exp_of(-x));
    if constexpr (kSlope) *slope = sigmoid * (T(1) + x * (T(1) - sigmoid));
    return x * sigmoid;
  } else {
    if constexpr (kSlope) *slope = broadcast(T(1));
    return x;
  }
}

}  // namespace
}  // namespace cvc::epipolar
