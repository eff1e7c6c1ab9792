// Features of voxels as pipelines over an executor (common/exec.h): dense volumes, gathers, reductions and trilinear
// samples. Sizes are known beforehand: nothing is read back. Threads run along the channels of a row, or along the
// cells of a volume, so that neighbours read and write neighbouring memory.
#pragma once

#include "voxels/pipeline.h"
#include "voxels/trilinear.h"

namespace cvc::voxels {

struct Volume {
  int64_t batch, x, y, z;

  CVC_HD int64_t cells() const { return x * y * z; }  // of one volume
  CVC_HD bool holds(const int32_t* c) const {
    return c[0] >= 0 && c[0] < batch && c[1] >= 0 && c[1] < x && c[2] >= 0 && c[2] < y && c[3] >= 0 && c[3] < z;
  }
  CVC_HD int64_t cell(const int32_t* c) const { return ((c[0] * x + c[1]) * y + c[2]) * z + c[3]; }
};

// Every cell learns the lowest row that names it, then takes that row's features.
template <class Exec, class T>
void write_dense(Exec& exec, const T* feats, const int32_t* coords, int64_t n, int64_t channels, Volume volume, T fill,
                 T* dense) {
  const int64_t size = volume.cells(), all = volume.batch * size;
  atomic64* const row = exec.template alloc<atomic64>(all);
  const atomic64 none = static_cast<atomic64>(n);
  exec.for_each(all, [=] CVC_HD(int64_t i) { row[i] = none; });
  exec.for_each(n, [=] CVC_HD(int64_t i) {
    if (volume.holds(coords + 4 * i)) atomic_min(row + volume.cell(coords + 4 * i), static_cast<atomic64>(i));
  });
  exec.for_each(all, [=] CVC_HD(int64_t i) {
    const int64_t from = static_cast<int64_t>(row[i]) * channels;
    T* const to = dense + i / size * channels * size + i % size;
    for (int64_t c = 0; c < channels; ++c) to[c * size] = row[i] == none ? fill : feats[from + c];
  });
}

template <class Exec, class T>
void read_dense(Exec& exec, const T* dense, const int32_t* coords, int64_t n, int64_t channels, Volume volume,
                T* feats) {
  const int64_t size = volume.cells();
  exec.for_each(n * channels, [=] CVC_HD(int64_t i) {
    const int32_t* const c = coords + 4 * (i / channels);
    if (!volume.holds(c)) {
      feats[i] = T{};
      return;
    }
    const int64_t cell = volume.cell(c);
    feats[i] = dense[(cell / size * channels + i % channels) * size + cell % size];
  });
}

// Rows of `units` elements, whatever they are.
template <class Exec, class T>
void gather_rows(Exec& exec, const T* feats, int64_t n, const int64_t* index, int64_t m, int64_t units, T fill,
                 T* out) {
  exec.for_each(m * units, [=] CVC_HD(int64_t i) {
    const int64_t row = index[i / units];
    out[i] = row >= 0 && row < n ? feats[row * units + i % units] : fill;
  });
}

// --- reduce ----------------------------------------------------------------------------------------------------------

// The entries that name each row, in their order.
struct Segments {
  const int64_t* begin;    // [rows + 1]
  const int64_t* entries;  // entries of no row come last
};

template <class Exec>
Segments segments_of(Exec& exec, const int64_t* index, int64_t n, int64_t rows) {
  uint64_t* const keys = exec.template alloc<uint64_t>(n);
  exec.for_each(n, [=] CVC_HD(int64_t i) {
    keys[i] = static_cast<uint64_t>(index[i] >= 0 && index[i] < rows ? index[i] : rows);
  });
  const SortedKeys sorted = detail::sort_keys(exec, keys, n);
  int64_t* const begin = exec.template alloc<int64_t>(rows + 1);
  exec.for_each(rows + 1,
                [=] CVC_HD(int64_t row) { begin[row] = detail::first_not_less(sorted, static_cast<uint64_t>(row)); });
  return {begin, sorted.rows};
}

enum class Reduction : int64_t { sum = 0, mean = 1, max = 2 };

// Each element is joined by one thread in the order of the rows: sums are always the same.
template <class Exec, class T>
void reduce_rows(Exec& exec, const T* feats, const int64_t* index, int64_t n, int64_t channels, int64_t rows,
                 Reduction reduction, bool include_self, T* out) {
  const Segments segments = segments_of(exec, index, n, rows);
  exec.for_each(rows * channels, [=] CVC_HD(int64_t i) {
    const int64_t first = segments.begin[i / channels], last = segments.begin[i / channels + 1];
    bool started = include_self || reduction != Reduction::max;
    T value = 0;
    for (int64_t k = first; k < last; ++k) {
      const T own = feats[segments.entries[k] * channels + i % channels];
      if (reduction != Reduction::max) {
        value += own;
      } else if (!started || own > value || own != own) {
        value = own, started = true;
      }
    }
    if (reduction == Reduction::mean && last > first) value /= static_cast<T>(last - first + include_self);
    out[i] = last > first ? value : T(0);
  });
}

// --- trilinear -------------------------------------------------------------------------------------------------------

// The rows of the eight voxels around every point, x slowest; -1 where there is none.
template <class Exec, class T>
void find_corners(Exec& exec, const T* points, const int64_t* batch, int64_t n, const int32_t* coords, int64_t size,
                  SampleGrid<T> grid, int64_t* rows) {
  const SortedKeys sorted = detail::sort_voxels(exec, coords, size);
  exec.for_each(8 * n, [=] CVC_HD(int64_t i) {
    const int64_t q = i / 8, volume = batch != nullptr ? batch[q] : 0;
    const int corner = static_cast<int>(i % 8);
    bool near = volume >= 0 && volume < static_cast<int64_t>(kMaxBatch);
    int32_t voxel[4] = {near ? static_cast<int32_t>(volume) : -1, 0, 0, 0};
    for (int k = 0; k < 3; ++k) {
      const T position = grid.position(points[3 * q + k]);
      const bool reachable = position >= -1 && position < static_cast<T>(kMaxCoord);  // false for NaN, too
      near = near && reachable;
      voxel[1 + k] = (reachable ? static_cast<int32_t>(std::floor(position)) : 0) + (corner >> (2 - k) & 1);
    }
    const int64_t place = near ? detail::place_of(sorted, key_or_none(voxel)) : -1;
    rows[i] = place < 0 ? -1 : sorted.rows[place];
  });
}

// The weights of a point's corners, scaled; false when none is there.
template <class T>
CVC_HD inline bool corner_weights(const Corners<T>& corners, const int64_t* rows, bool renormalize, T* weights,
                                  T* scale) {
  bool any = false;
  for (int c = 0; c < 8; ++c) {
    weights[c] = rows[c] >= 0 ? corners.weight(c) : T(0);
    any = any || rows[c] >= 0;
  }
  *scale = any ? weight_scale(weights, renormalize) : T(0);
  return any;
}

template <class Exec, class T>
void interpolate(Exec& exec, const T* feats, int64_t channels, const T* points, const int64_t* rows, int64_t n,
                 SampleGrid<T> grid, bool renormalize, T* out) {
  exec.for_each(n * channels, [=] CVC_HD(int64_t i) {
    const int64_t q = i / channels;
    const Corners<T> corners(grid, points + 3 * q);
    T weights[8], scale, value = 0;
    if (corner_weights(corners, rows + 8 * q, renormalize, weights, &scale))
      for (int c = 0; c < 8; ++c)
        if (rows[8 * q + c] >= 0) value += weights[c] * scale * feats[rows[8 * q + c] * channels + i % channels];
    out[i] = value;
  });
}

// by_feats: one thread per element, in the order of the points; by_points: one thread per point.
template <class Exec, class T>
void interpolate_backward(Exec& exec, const T* grad, const T* feats, int64_t channels, int64_t num_rows,
                          const T* points, const int64_t* rows, int64_t n, SampleGrid<T> grid, bool renormalize,
                          T* by_feats, T* by_points) {
  T* const weights = exec.template alloc<T>(8 * n);
  exec.for_each(n, [=] CVC_HD(int64_t q) {
    const Corners<T> corners(grid, points + 3 * q);
    T weight[8], scale, toward[8] = {}, mean = 0, by_position[3] = {};
    const bool any = corner_weights(corners, rows + 8 * q, renormalize, weight, &scale);
    for (int c = 0; c < 8; ++c) {
      const int64_t row = rows[8 * q + c];
      weights[8 * q + c] = any ? weight[c] * scale : T(0);
      if (row < 0) continue;
      for (int64_t k = 0; k < channels; ++k) toward[c] += feats[row * channels + k] * grad[q * channels + k];
      mean += weight[c] * scale * toward[c];
    }
    for (int c = 0; c < 8; ++c) {
      if (rows[8 * q + c] < 0) continue;
      const T slope = renormalize ? (toward[c] - mean) * scale : toward[c];
      for (int axis = 0; axis < 3; ++axis) by_position[axis] += slope * corners.slope(c, axis);
    }
    for (int axis = 0; axis < 3; ++axis) by_points[3 * q + axis] = by_position[axis] / grid.h;
  });
  const Segments segments = segments_of(exec, rows, 8 * n, num_rows);
  exec.for_each(num_rows * channels, [=] CVC_HD(int64_t i) {
    T sum = 0;
    for (int64_t k = segments.begin[i / channels]; k < segments.begin[i / channels + 1]; ++k) {
      const int64_t entry = segments.entries[k];
      sum += weights[entry] * grad[entry / 8 * channels + i % channels];
    }
    by_feats[i] = sum;
  });
}

}  // namespace cvc::voxels
