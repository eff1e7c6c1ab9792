// Register-blocked products for isa_*.cpp only: everything has internal linkage.
//
// Rows of features are read in place through pointers, whatever permutation or stride they come with. The scores of a
// panel of queries are kept transposed, [key][query]: keys need no packing, and the softmax runs along vectors of
// queries without a horizontal operation.
#pragma once

#include "common/lanes.h"

namespace cvc::sparse_attention {
namespace {

#if defined(CVC_SIMD_AVX512)
constexpr int kTile = 12;
#else
constexpr int kTile = 6;  // with two vectors each: 12 of 16 registers accumulate
#endif

// Queries of a panel, keys of a chunk: the scores of a panel and a chunk stay in the first-level cache.
template <class T>
constexpr int kPanel = 2 * kWidth<T>;
constexpr int kChunk = 128;

template <class T>
constexpr int64_t padded(int64_t n) {
  return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

// out[r] (+)= Σ_i a(r, i) · b(i) for `rows` rows and `vectors` vectors.
template <class T, int rows, int vectors, bool accumulate, class A, class B>
inline void tile(const A& a, const B& b, int64_t depth, T* out, int64_t stride) {
  using V = Vec<T>;
  constexpr int w = kWidth<T>;
  V sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < vectors; ++c) sum[r][c] = V{};
  for (int64_t i = 0; i < depth; ++i) {
    const T* const from = b(i);
    V right[vectors];
#pragma GCC unroll 2
    for (int c = 0; c < vectors; ++c) right[c] = load<V>(from + c * w);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const V left = a(r, i) - V{};
#pragma GCC unroll 2
      for (int c = 0; c < vectors; ++c) sum[r][c] += left * right[c];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < vectors; ++c) {
      T* const to = out + r * stride + c * w;
      store(to, accumulate ? load<V>(to) + sum[r][c] : sum[r][c]);
    }
}

template <class T, int rows, int vectors, bool accumulate, class A, class B>
inline void last_tile(int64_t count, const A& a, const B& b, int64_t depth, T* out, int64_t stride) {
  if constexpr (rows > 0) {
    if (count == rows) return tile<T, rows, vectors, accumulate>(a, b, depth, out, stride);
    last_tile<T, rows - 1, vectors, accumulate>(count, a, b, depth, out, stride);
  }
}

// One or two vectors of columns, all rows.
template <class T, int vectors, bool accumulate, class A, class B>
inline void columns(int64_t rows, const A& a, const B& b, int64_t depth, T* out, int64_t stride) {
  int64_t r = 0;
  for (; r + kTile <= rows; r += kTile)
    tile<T, kTile, vectors, accumulate>([&](int k, int64_t i) { return a(r + k, i); }, b, depth, out + r * stride,
                                        stride);
  last_tile<T, kTile - 1, vectors, accumulate>(
      rows - r, [&](int k, int64_t i) { return a(r + k, i); }, b, depth, out + r * stride, stride);
}

// out[r][0..width) (+)= Σ_i a(r, i) · b(i)[0..width), width a multiple of a vector.
template <class T, bool accumulate, class A, class B>
inline void product(int64_t rows, int64_t width, const A& a, const B& b, int64_t depth, T* out, int64_t stride) {
  constexpr int w = kWidth<T>;
  int64_t c = 0;
  for (; c + 2 * w <= width; c += 2 * w)
    columns<T, 2, accumulate>(rows, a, [&](int64_t i) { return b(i) + c; }, depth, out + c, stride);
  if (c < width) columns<T, 1, accumulate>(rows, a, [&](int64_t i) { return b(i) + c; }, depth, out + c, stride);
}

}  // namespace
}  // namespace cvc::sparse_attention
