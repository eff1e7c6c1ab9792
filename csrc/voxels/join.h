// How rows of features that share a row of the result become one: the sum, mean or maximum, row after row.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <tuple>

#include "voxels/vector16.h"

namespace cvc::voxels {

enum class Reduction : int64_t { sum = 0, mean = 1, max = 2 };

template <class T>
void start_rows(T* out, int64_t count, Reduction reduction, bool include_self) {
  const T first = reduction == Reduction::max && !include_self ? -std::numeric_limits<T>::infinity() : T(0);
  for (int64_t i = 0; i < count; ++i) out[i] = first;
}

template <bool kMax, class V>
V join(V out, V row) {
  if constexpr (kMax) {
    return (row > out) | (row != row) ? row : out;
  } else {
    return out + row;
  }
}

template <bool kMax, int64_t kVectors, class T>
void join_vectors(const T* row, T* out) {
  using V = Vector16<T>;
  for (int64_t k = 0; k < kVectors; ++k)
    V::store(join<kMax>(V::load(out + V::kLanes * k), V::load(row + V::kLanes * k)), out + V::kLanes * k);
}

template <bool kMax, class T>
void join_row(const T* row, int64_t channels, T* out) {
  constexpr int64_t kLanes = Vector16<T>::kLanes;
  int64_t c = 0;
  for (; c + 8 * kLanes <= channels; c += 8 * kLanes) join_vectors<kMax, 8>(row + c, out + c);
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) join_vectors<kMax, 2>(row + c, out + c);
  for (; c + kLanes <= channels; c += kLanes) join_vectors<kMax, 1>(row + c, out + c);
  for (; c < channels; ++c) {
    if constexpr (kMax) {
      out[c] = row[c] > out[c] || row[c] != row[c] ? row[c] : out[c];
    } else {
      out[c] += row[c];
    }
  }
}

// out[c] = f(sum[c]); they may be the same row.
template <class T, class F>
void map_row(const T* sum, int64_t channels, T* out, const F& f) {
  using V = Vector16<T>;
  int64_t c = 0;
  for (; c + V::kLanes <= channels; c += V::kLanes) V::store(f(V::load(sum + c)), out + c);
  for (; c < channels; ++c) out[c] = f(sum[c]);
}

// What the sum or maximum of `count` rows comes to.
template <class T>
void finish_row(const T* sum, int64_t channels, Reduction reduction, int64_t count, bool include_self, T* out) {
  const int64_t divisor = reduction == Reduction::mean ? count + include_self : 1;
  if (count == 0) {
    map_row(sum, channels, out, [](auto v) { return decltype(v){}; });
  } else if (divisor == 1) {
    map_row(sum, channels, out, [](auto v) { return v; });
  } else if ((divisor & (divisor - 1)) == 0) {  // exactly the quotient, without the divider
    const T inverse = T(1) / static_cast<T>(divisor);
    map_row(sum, channels, out, [=](auto v) { return v * inverse; });
  } else {
    map_row(sum, channels, out, [=](auto v) { return v / static_cast<T>(divisor); });
  }
}

// The rows of `feats` by the row of the result that `index` names, −1 for none (features_cpu.cpp); false when an index
// is out of range.
std::tuple<torch::stable::Tensor, bool> reduce_features(torch::stable::Tensor feats, torch::stable::Tensor index,
                                                        int64_t num_rows, int64_t reduction, bool include_self);

}  // namespace cvc::voxels
