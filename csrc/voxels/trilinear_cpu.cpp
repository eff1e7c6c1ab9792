// Trilinear sampling of sparse voxels: which rows surround every point, their weighted mean, and its gradients.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "voxels/deal.h"
#include "voxels/fetch.h"
#include "voxels/places.h"
#include "voxels/trilinear.h"
#include "voxels/vector16.h"

namespace cvc::voxels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- corners ---------------------------------------------------------------------------------------------------------

// Where ascending keys begin that share their leading bits; about one voxel each, if they were even.
class Finder {
 public:
  explicit Finder(const Ascending& voxels) : voxels_(voxels), layout_(voxels.given.scan[0]) {
    const bool small = voxels.size < (int64_t{1} << 32);
    const int bits = small ? std::min(layout_.bits, detail::bit_length(static_cast<uint64_t>(voxels.size))) : 0;
    shift_ = layout_.bits - bits;
    const int64_t bins = int64_t{1} << bits;
    begin_ = Buffer<uint32_t>(bins + 1);
    if (!small) return;
    for_each_range(voxels.size + 1, [&](int64_t from, int64_t to) {
      int64_t bin = from > 0 ? bin_of(voxels_.key(from - 1)) + 1 : 0;
      for (int64_t i = from; i < to; ++i)
        for (const int64_t own = i < voxels_.size ? bin_of(voxels_.key(i)) : bins; bin <= own; ++bin)
          begin_[bin] = static_cast<uint32_t>(i);
    });
  }

  int64_t bin_of(uint64_t key) const { return static_cast<int64_t>(layout_.narrow(key) >> shift_); }
  [[gnu::always_inline]] void prefetch_bin(uint64_t key) const { __builtin_prefetch(begin_.data() + bin_of(key)); }
  // Always inline: the compiler drops calls of functions that do nothing but prefetch.
  [[gnu::always_inline]] void prefetch_keys(uint64_t key) const {
    if (voxels_.size < (int64_t{1} << 32)) __builtin_prefetch(voxels_.keys + begin_[bin_of(key)]);
  }
  // The first voxel that is not less than a key within the box of all voxels.
  int64_t find(uint64_t key) const {
    if (voxels_.size >= (int64_t{1} << 32)) return voxels_.find(key);
    const int64_t bin = bin_of(key);
    int64_t low = begin_[bin], count = begin_[bin + 1] - low;
    while (count > 0) {
      const int64_t half = count / 2;
      const bool less = voxels_.key(low + half) < key;
      low = less ? low + half + 1 : low;
      count = less ? count - half - 1 : half;
    }
    return low;
  }

 private:
  const Ascending& voxels_;
  const Layout layout_;
  int shift_ = 0;
  Buffer<uint32_t> begin_;
};

// The voxels around points: base, base + 1 along every axis, as far as the box of all voxels reaches.
template <class T>
class Around {
 public:
  Around(const T* points, const int64_t* batch, const Scan& box, const SampleGrid<T>& grid)
      : points_(points), batch_(batch), grid_(grid) {
    write_voxel(box.lowest, low_);
    write_voxel(box.highest, high_);
  }

  struct Base {
    int32_t c[4];
    bool near;  // whether any of the eight may be there
  };
  Base operator()(int64_t q) const {
    const int64_t b = batch_ ? batch_[q] : 0;
    Base base{{0, 0, 0, 0}, b >= low_[0] && b <= high_[0]};
    base.c[0] = static_cast<int32_t>(base.near ? b : 0);
    for (int k = 0; k < 3; ++k) {
      const T position = grid_.position(points_[3 * q + k]);
      const bool reachable = position >= -1 && position < static_cast<T>(kMaxCoord);  // false for NaN, too
      base.c[k + 1] = reachable ? static_cast<int32_t>(std::floor(position)) : -2;
      base.near &= reachable && base.c[k + 1] + 1 >= low_[k + 1] && base.c[k + 1] <= high_[k + 1];
    }
    return base;
  }
  bool holds(int axis, int32_t value) const { return value >= low_[axis] && value <= high_[axis]; }
  // The first voxel in the box of pair k, along z; whether there is one.
  bool pair(const Base& base, int k, int32_t* c) const {
    c[0] = base.c[0];
    c[1] = base.c[1] + (k >> 1);
    c[2] = base.c[2] + (k & 1);
    c[3] = std::max(base.c[3], low_[3]);
    return base.near && holds(1, c[1]) && holds(2, c[2]);
  }

 private:
  const T* const points_;
  const int64_t* const batch_;
  const SampleGrid<T> grid_;
  int32_t low_[4], high_[4];
};

constexpr int64_t kPointBlock = 32;

// By bits: every pair is a look at one word.
template <class T>
void corner_rows(const Around<T>& around, int64_t n, const Ascending& voxels, const Places& places, int64_t* rows) {
  for_each_range(n, [&](int64_t begin, int64_t end) {
    const Box box = places.box;  // its members in registers
    struct Pairs {
      uint64_t cell[4];
      bool inside[4];
      bool lower, upper;  // whether these lie in the box
      bool shifted;       // whether the cell is that of the upper ones
    } block[kPointBlock];
    for (int64_t from = begin; from < end; from += kPointBlock) {
      const int64_t count = std::min(kPointBlock, end - from);
      for (int64_t i = 0; i < count; ++i) {
        Pairs& pairs = block[i];
        const auto base = around(from + i);
        pairs.lower = around.holds(3, base.c[3]);
        pairs.upper = around.holds(3, base.c[3] + 1);
        for (int k = 0; k < 4; ++k) {
          int32_t c[4];
          pairs.inside[k] = around.pair(base, k, c);
          pairs.shifted = c[3] > base.c[3];
          pairs.cell[k] = pairs.inside[k] ? box.cell(c) : 0;
          places.prefetch(pairs.cell[k]);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const Pairs& pairs = block[i];
        int64_t* const row = rows + 8 * (from + i);
        const auto look = [&](uint64_t cell) {
          const int64_t place = places.find(cell);
          return place < 0 ? -1 : voxels.row(place);
        };
        for (int k = 0; k < 4; ++k) {
          row[2 * k] = pairs.inside[k] && pairs.lower ? look(pairs.cell[k]) : -1;
          row[2 * k + 1] = pairs.inside[k] && pairs.upper ? look(pairs.cell[k] + !pairs.shifted) : -1;
        }
      }
    }
  });
}

// By searching the keys: for voxels that are spread thin, or repeat.
template <class T>
void corner_rows(const Around<T>& around, int64_t n, const Ascending& voxels, const Finder& finder, int64_t* rows) {
  for_each_range(n, [&](int64_t begin, int64_t end) {
    struct Pairs {
      uint64_t key[4];  // of the pair's first voxel in the box
      bool inside[4];
      int32_t z;  // of the lower voxels
    } block[kPointBlock];
    for (int64_t from = begin; from < end; from += kPointBlock) {
      const int64_t count = std::min(kPointBlock, end - from);
      for (int64_t i = 0; i < count; ++i) {
        const auto base = around(from + i);
        block[i].z = base.c[3];
        for (int k = 0; k < 4; ++k) {
          int32_t c[4];
          block[i].inside[k] = around.pair(base, k, c);
          block[i].key[k] = block[i].inside[k] ? key_of(c) : voxels.given.scan[0].lowest;
          finder.prefetch_bin(block[i].key[k]);
        }
      }
      for (int64_t i = 0; i < count; ++i)
        for (const uint64_t key : block[i].key) finder.prefetch_keys(key);
      for (int64_t i = 0; i < count; ++i)
        for (int k = 0; k < 4; ++k) {
          int64_t* const pair = rows + 8 * (from + i) + 2 * k;
          pair[0] = pair[1] = -1;
          if (!block[i].inside[k]) continue;
          const uint64_t key = block[i].key[k], line = key & ~uint64_t{0xFFFF};
          int64_t place = finder.find(key);
          for (int upper = 0; upper < 2; ++upper) {
            const int64_t z = block[i].z + upper;
            if (z < 0 || z >= kMaxCoord || place >= voxels.size) continue;
            if (voxels.key(place) != (line | static_cast<uint64_t>(z))) continue;
            pair[upper] = voxels.row(place);
            // Past equal voxels: the lowest row counts.
            while (upper == 0 && ++place < voxels.size && voxels.key(place) == voxels.key(place - 1)) {
            }
          }
        }
    }
  });
}

template <class T>
void corner_rows(const Tensor& points, const int64_t* batch, const Ascending& voxels, const SampleGrid<T>& grid,
                 int64_t* rows) {
  const Around<T> around(static_cast<const T*>(points.const_data_ptr()), batch, voxels.given.scan[0], grid);
  const int64_t n = points.size(0);
  if (Places::suit(voxels)) {
    corner_rows(around, n, voxels, Places(voxels), rows);
  } else {
    corner_rows(around, n, voxels, Finder(voxels), rows);
  }
}

std::tuple<Tensor, int64_t> trilinear_corners(Tensor points, std::optional<Tensor> batch, Tensor coords,
                                              int64_t resolution, double lo, double hi, bool assume_unique) {
  const Ascending voxels(coords);
  const int64_t n = points.size(0);
  Tensor rows = new_tensor(points, {n, 8}, ScalarType::Long);
  if (voxels.faults) return {rows, voxels.faults};
  if (!voxels.distinct && !assume_unique) return {rows, kDuplicate};
  int64_t* const out = data_of<int64_t>(rows);
  if (voxels.size == 0) {
    for_each_range(8 * n, [&](int64_t begin, int64_t end) { std::fill(out + begin, out + end, int64_t{-1}); });
    return {rows, 0};
  }
  const int64_t* const volume = batch ? static_cast<const int64_t*>(batch->const_data_ptr()) : nullptr;
  const double h = (hi - lo) / static_cast<double>(resolution);
  if (points.scalar_type() == ScalarType::Double) {
    corner_rows<double>(points, volume, voxels, {lo, h}, out);
  } else {
    corner_rows<float>(points, volume, voxels, {static_cast<float>(lo), static_cast<float>(h)}, out);
  }
  return {rows, 0};
}

// --- values ----------------------------------------------------------------------------------------------------------

template <class T>
[[gnu::always_inline]] inline void fetch_corners(const T* feats, const int64_t* rows, int64_t channels) {
  for (int c = 0; c < 8; ++c)
    if (rows[c] >= 0) fetch_row(feats + rows[c] * channels, channels * sizeof(T));
}

bool any_present(const int64_t* rows) {
  bool any = false;
  for (int c = 0; c < 8; ++c) any |= rows[c] >= 0;
  return any;
}

// The weighted sum of so many vectors of channels, in registers.
template <int64_t kVectors, class T>
void blend(const T* feats, int64_t channels, const int64_t* rows, const T* weights, T* out) {
  using V = Vector16<T>;
  typename V::Lanes sum[kVectors] = {};
  for (int c = 0; c < 8; ++c) {
    if (rows[c] < 0) continue;
    const T* const row = feats + rows[c] * channels;
    for (int64_t k = 0; k < kVectors; ++k) sum[k] += weights[c] * V::load(row + V::kLanes * k);
  }
  for (int64_t k = 0; k < kVectors; ++k) V::store(sum[k], out + V::kLanes * k);
}

constexpr int64_t kAhead = 8;

template <class T>
void interpolate(const T* feats, int64_t channels, const T* points, const int64_t* rows, int64_t n,
                 const SampleGrid<T>& grid, bool renormalize, T* out) {
  for_each_range(n, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) {
      const int64_t* const corner = rows + 8 * q;
      if (q + kAhead < end) fetch_corners(feats, corner + 8 * kAhead, channels);
      T* const value = out + q * channels;
      if (!any_present(corner)) {
        std::fill(value, value + channels, T(0));
        continue;
      }
      const Corners<T> corners(grid, points + 3 * q);
      T weights[8];
      for (int c = 0; c < 8; ++c) weights[c] = corner[c] >= 0 ? corners.weight(c) : T(0);
      const T scale = weight_scale(weights, renormalize);
      for (T& weight : weights) weight *= scale;
      constexpr int64_t kLanes = Vector16<T>::kLanes;
      int64_t k = 0;
      for (; k + 4 * kLanes <= channels; k += 4 * kLanes) blend<4>(feats + k, channels, corner, weights, value + k);
      for (; k + kLanes <= channels; k += kLanes) blend<1>(feats + k, channels, corner, weights, value + k);
      for (; k < channels; ++k) {
        T sum = 0;
        for (int c = 0; c < 8; ++c)
          if (corner[c] >= 0) sum += weights[c] * feats[corner[c] * channels + k];
        value[k] = sum;
      }
    }
  });
}

// --- gradients -------------------------------------------------------------------------------------------------------

// In two vectors of sums, so that nothing waits for the addition before it.
template <class T>
T dot(const T* a, const T* b, int64_t n) {
  using V = Vector16<T>;
  typename V::Lanes even = {}, odd = {};
  int64_t k = 0;
  for (; k + 2 * V::kLanes <= n; k += 2 * V::kLanes) {
    even += V::load(a + k) * V::load(b + k);
    odd += V::load(a + k + V::kLanes) * V::load(b + k + V::kLanes);
  }
  even += odd;
  T sum = 0;
  for (int64_t l = 0; l < V::kLanes; ++l) sum += even[l];
  for (; k < n; ++k) sum += a[k] * b[k];
  return sum;
}

// A point's part in the gradient of a row of features.
template <class T, class Index>
struct Share {
  Index query, row;
  T weight;
};

// The gradient by the points; calls give(row, share) for each of their corners on the way.
template <class Index, class T, class Give>
void gradient_by_points(const T* grad, const T* feats, int64_t channels, const T* points, const int64_t* rows,
                        int64_t begin, int64_t end, const SampleGrid<T>& grid, bool renormalize, T* by_points,
                        const Give& give) {
  for (int64_t q = begin; q < end; ++q) {
    const int64_t* const corner = rows + 8 * q;
    if (q + kAhead < end) fetch_corners(feats, corner + 8 * kAhead, channels);
    T by_position[3] = {0, 0, 0};
    if (any_present(corner)) {
      const Corners<T> corners(grid, points + 3 * q);
      T weight[8], toward[8], mean = 0;
      for (int c = 0; c < 8; ++c) {
        weight[c] = corner[c] >= 0 ? corners.weight(c) : T(0);
        toward[c] = corner[c] >= 0 ? dot(feats + corner[c] * channels, grad + q * channels, channels) : T(0);
      }
      const T scale = weight_scale(weight, renormalize);
      for (int c = 0; c < 8; ++c) weight[c] *= scale, mean += weight[c] * toward[c];
      for (int c = 0; c < 8; ++c) {
        if (corner[c] < 0) continue;
        give(corner[c], Share<T, Index>{static_cast<Index>(q), static_cast<Index>(corner[c]), weight[c]});
        const T slope = renormalize ? (toward[c] - mean) * scale : toward[c];
        for (int axis = 0; axis < 3; ++axis) by_position[axis] += slope * corners.slope(c, axis);
      }
    }
    for (int axis = 0; axis < 3; ++axis) by_points[3 * q + axis] = by_position[axis] / grid.h;
  }
}

template <class T>
void add_scaled(const T* __restrict from, T weight, int64_t channels, T* __restrict to) {
  using V = Vector16<T>;
  int64_t k = 0;
  for (; k + V::kLanes <= channels; k += V::kLanes) V::store(V::load(to + k) + weight * V::load(from + k), to + k);
  for (; k < channels; ++k) to[k] += weight * from[k];
}

// Points are in any order, and rows are summed in the order of the points: shares are dealt to tasks that own rows.
template <class Index, class T>
void gradients(const T* grad, const T* feats, int64_t channels, const T* points, const int64_t* rows, int64_t n,
               int64_t num_rows, const SampleGrid<T>& grid, bool renormalize, T* by_feats, T* by_points) {
  const Parts parts(num_rows, (1 << 16) / std::max<int64_t>(channels, 1));
  const auto dealt = deal_out<Share<T, Index>>(
      n, parts,
      [&](int64_t begin, int64_t end, const auto& see) {
        for (int64_t k = 8 * begin; k < 8 * end; ++k) see(rows[k]);
      },
      [&](int64_t begin, int64_t end, const auto& give) {
        gradient_by_points<Index>(grad, feats, channels, points, rows, begin, end, grid, renormalize, by_points, give);
      });
  for_each_task(parts.count, [&](int64_t part) {
    std::fill(by_feats + parts.begin(part) * channels, by_feats + parts.end(part) * channels, T(0));
    constexpr int64_t kSharesAhead = 16;
    const int64_t last = dealt.first[part + 1];
    for (int64_t k = dealt.first[part]; k < last; ++k) {
      if (k + kSharesAhead < last)
        fetch_row(grad + static_cast<int64_t>(dealt.items[k + kSharesAhead].query) * channels, channels * sizeof(T));
      const auto share = dealt.items[k];
      add_scaled(grad + static_cast<int64_t>(share.query) * channels, share.weight, channels,
                 by_feats + static_cast<int64_t>(share.row) * channels);
    }
  });
}

// --- operators -------------------------------------------------------------------------------------------------------

template <class F>
void by_type(const Tensor& tensor, double lo, double hi, int64_t resolution, const F& f) {
  const double h = (hi - lo) / static_cast<double>(resolution);
  if (tensor.scalar_type() == ScalarType::Double) {
    f(SampleGrid<double>{lo, h});
  } else {
    f(SampleGrid<float>{static_cast<float>(lo), static_cast<float>(h)});
  }
}

Tensor trilinear_interpolate(Tensor feats, Tensor points, Tensor rows, int64_t resolution, double lo, double hi,
                             bool renormalize) {
  const int64_t n = points.size(0), channels = feats.size(1);
  Tensor out = new_tensor(feats, {n, channels}, feats.scalar_type());
  by_type(feats, lo, hi, resolution, [&]<class T>(const SampleGrid<T>& grid) {
    interpolate(static_cast<const T*>(feats.const_data_ptr()), channels, static_cast<const T*>(points.const_data_ptr()),
                static_cast<const int64_t*>(rows.const_data_ptr()), n, grid, renormalize, data_of<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> trilinear_interpolate_backward(Tensor grad, Tensor feats, Tensor points, Tensor rows,
                                                          int64_t resolution, double lo, double hi, bool renormalize) {
  const int64_t n = points.size(0), channels = feats.size(1), num_rows = feats.size(0);
  Tensor by_feats = new_tensor(feats, {num_rows, channels}, feats.scalar_type());
  Tensor by_points = new_tensor(points, {n, 3}, points.scalar_type());
  by_type(feats, lo, hi, resolution, [&]<class T>(const SampleGrid<T>& grid) {
    const T* const g = static_cast<const T*>(grad.const_data_ptr());
    const int64_t* const corner = static_cast<const int64_t*>(rows.const_data_ptr());
    const auto run = [&](auto index) {
      gradients<decltype(index)>(g, static_cast<const T*>(feats.const_data_ptr()), channels,
                                 static_cast<const T*>(points.const_data_ptr()), corner, n, num_rows, grid, renormalize,
                                 data_of<T>(by_feats), data_of<T>(by_points));
    };
    std::max(n, num_rows) < int64_t{1} << 32 ? run(uint32_t{}) : run(int64_t{});
  });
  return {by_feats, by_points};
}

}  // namespace
}  // namespace cvc::voxels

STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def(
      "trilinear_corners(Tensor points, Tensor? batch, Tensor coords, int resolution, float lo, float hi, "
      "bool assume_unique) -> (Tensor, int)");
  m.def(
      "trilinear_interpolate(Tensor feats, Tensor points, Tensor rows, int resolution, float lo, float hi, "
      "bool renormalize) -> Tensor");
  m.def(
      "trilinear_interpolate_backward(Tensor grad, Tensor feats, Tensor points, Tensor rows, int resolution, float lo, "
      "float hi, bool renormalize) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("trilinear_corners", TORCH_BOX(&cvc::voxels::trilinear_corners));
  m.impl("trilinear_interpolate", TORCH_BOX(&cvc::voxels::trilinear_interpolate));
  m.impl("trilinear_interpolate_backward", TORCH_BOX(&cvc::voxels::trilinear_interpolate_backward));
}
