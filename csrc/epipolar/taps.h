// From cameras and depth to the corners that every sample of a tile of pixels reads, for isa_*.cpp only.
#pragma once

#include "epipolar/lanes.h"

namespace cvc::epipolar {
namespace {

constexpr int64_t kTilePixels = 64;
constexpr int64_t kLanes = kTilePixels + kWidth<float>;  // what a last, partial vector may touch

// Memory of one thread, handed out front to back. Over a null base it only counts.
class Arena {
 public:
  explicit Arena(unsigned char* base) : base_(base) {}
  template <class T>
  T* take(int64_t n) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  size_t used() const { return used_; }

 private:
  unsigned char* base_;
  size_t used_ = 0;
};

struct Tile {
  int64_t b, q, row, column, rows, columns, pixels;

  int64_t i(int64_t pixel) const { return row + pixel / columns; }
  int64_t j(int64_t pixel) const { return column + pixel % columns; }
};

template <class T>
inline Tile tile_at(const Geometry<T>& g, const Tiling& tiling, int64_t index) {
  const int64_t image = index / tiling.per_image(), in_image = index % tiling.per_image();
  Tile t;
  t.b = image / g.queries, t.q = image % g.queries;
  t.row = in_image / tiling.across * tiling.rows, t.column = in_image % tiling.across * tiling.columns;
  t.rows = g.height - t.row < tiling.rows ? g.height - t.row : tiling.rows;
  t.columns = g.width - t.column < tiling.columns ? g.width - t.column : tiling.columns;
  t.pixels = t.rows * t.columns;
  return t;
}

// The ray through every pixel of a tile.
template <class T>
struct PixelRays {
  T a[kLanes], b[kLanes], x[kLanes], y[kLanes], inverse_norm[kLanes];
  T depth[kLanes];  // NaN where the pixel is void: every test on what follows from it is then false
  bool is_void[kLanes];

  PixelRays(const Geometry<T>& g, const Tile& tile) {
    const T* rays = g.rays + (tile.b * g.queries + tile.q) * 6;
    const T* depths = g.depth + tile.b * g.depth_stride[0] + tile.q * g.depth_stride[1];
    const T nan = static_cast<T>(__builtin_nan(""));
    int64_t p = 0;
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t c = 0; c < tile.columns; ++c, ++p) {
        const int64_t i = tile.row + r, j = tile.column + c;
        const T z = depths[i * g.depth_stride[2] + j * g.depth_stride[3]];
        is_void[p] = !(z - z == T(0)) || (!g.ortho && z <= T(0));
        depth[p] = is_void[p] ? nan : z;
        a[p] = static_cast<T>(j) + T(0.5), b[p] = static_cast<T>(g.first_row + i) + T(0.5);
      }
    for (; p < kLanes; ++p) is_void[p] = true, depth[p] = nan, a[p] = b[p] = T(0);
    for (p = 0; p < kLanes; p += kWidth<T>) {
      const Vec<T> u = load<Vec<T>>(a + p), v = load<Vec<T>>(b + p);
      const Vec<T> px = rays[0] * u + rays[1] * v + rays[2], py = rays[3] * u + rays[4] * v + rays[5];
      store(x + p, px), store(y + p, py);
      store(inverse_norm + p, T(1) / root_of(px * px + py * py + T(1)));
    }
  }
};

// Sample k of a vector of pixels, in the reference camera's frame.
template <class T>
struct Samples {
  Vec<T> delta, x, y, t;
};

// Offsets of sample k from the depth, along the ray or the axis, for the pixels of a tile.
template <class T>
inline void load_jitter(const Geometry<T>& g, const Tile& tile, int64_t k, T* delta) {
  const T step = T(2) * g.radius / static_cast<T>(g.points);
  const T* jitter = nullptr;
  if (g.jitter) jitter = g.jitter + tile.b * g.jitter_stride[0] + tile.q * g.jitter_stride[1] + k * g.jitter_stride[4];
  for (int64_t r = 0, p = 0; r < tile.rows; ++r)
    for (int64_t c = 0; c < tile.columns; ++c, ++p) {
      const T shift =
          jitter ? jitter[(tile.row + r) * g.jitter_stride[2] + (tile.column + c) * g.jitter_stride[3]] : T(0.5);
      delta[p] = (static_cast<T>(k) + shift) * step - g.radius;
    }
}

template <class T>
inline Samples<T> samples_at(const Geometry<T>& g, const PixelRays<T>& rays, const T* delta, int64_t p) {
  using V = Vec<T>;
  Samples<T> s;
  s.delta = load<V>(delta + p);
  const V z = load<V>(rays.depth + p), x = load<V>(rays.x + p), y = load<V>(rays.y + p);
  if (g.ortho) {
    s.t = z + s.delta, s.x = x, s.y = y;
  } else {
    s.t = z + (g.along_ray ? s.delta * load<V>(rays.inverse_norm + p) : s.delta);
    s.x = s.t * x, s.y = s.t * y;
  }
  return s;
}

// Where samples fall in one neighbour's map.
template <class T>
struct Projected {
  Vec<T> u, v, inverse_z;
  Mask<T> contributes, seen;
};

template <class T>
inline Projected<T> project(const Geometry<T>& g, const T* m, const Samples<T>& s) {
  using V = Vec<T>;
  Projected<T> out;
  out.u = m[0] * s.x + m[1] * s.y + m[2] * s.t + m[3];
  out.v = m[4] * s.x + m[5] * s.y + m[6] * s.t + m[7];
  out.inverse_z = broadcast(T(1));
  Mask<T> ok = s.t == s.t;
  if (!g.ortho) {
    const V z = m[8] * s.x + m[9] * s.y + m[10] * s.t + m[11];
    out.u /= z, out.v /= z, out.inverse_z /= z;
    ok = (s.t > T(0)) & (z > T(0));
  }
  const T width = static_cast<T>(g.map_width), height = static_cast<T>(g.map_height);
  const V x = out.u - T(0.5), y = out.v - T(0.5);
  out.contributes = ok & (x > T(-1)) & (x < width) & (y > T(-1)) & (y < height);
  out.seen = ok & (out.u >= T(0)) & (out.u <= width) & (out.v >= T(0)) & (out.v <= height);
  return out;
}

// The corners of all samples of a tile. Those of sample (pixel, k) start at (pixel · P + k) · 4N, slot after slot;
// corners outside of the map are left out.
template <class T, bool kBackward>
struct Taps {
  int64_t points, per_sample;
  int64_t* source;       // element of the map
  T* weight;             // bilinear
  int64_t* target;       // element of the map's gradient
  T *slope_x, *slope_y;  // the weight's derivative by x, y
  int32_t* count;        // [pixel · P + k]
  uint8_t* slot_count;   // [(pixel · P + k) · N + n]
  uint8_t* kept;         // [pixel · P + k]: whether the softmax has this sample

  Taps(const Geometry<T>& g, int64_t pixels, Arena& arena) : points(g.points), per_sample(4 * g.slots) {
    const int64_t samples = pixels * points;
    source = arena.take<int64_t>(samples * per_sample);
    weight = arena.take<T>(samples * per_sample);
    count = arena.take<int32_t>(samples);
    kept = arena.take<uint8_t>(samples);
    if constexpr (kBackward) {
      target = arena.take<int64_t>(samples * per_sample);
      slope_x = arena.take<T>(samples * per_sample);
      slope_y = arena.take<T>(samples * per_sample);
      slot_count = arena.take<uint8_t>(samples * g.slots);
    }
  }

  // Slot n reads map n, or map `map_of[n]`.
  void build(const Geometry<T>& g, const Tile& tile, const int64_t* map_stride, const int64_t* grad_stride,
             const int64_t* map_of = nullptr) {
    const PixelRays<T> rays(g, tile);
    const T* projection = g.projection + (tile.b * g.queries + tile.q) * g.slots * 12;
    const int64_t first = tile.b * map_stride[0] + tile.q * map_stride[1];
    int64_t first_target = 0;
    if constexpr (kBackward) first_target = tile.b * grad_stride[0] + tile.q * grad_stride[1];
    for (int64_t k = 0; k < points; ++k) {
      T delta[kLanes] = {};
      load_jitter(g, tile, k, delta);
      for (int64_t p = 0; p < tile.pixels; ++p) {
        count[p * points + k] = 0;
        kept[p * points + k] = !g.mask && !rays.is_void[p];
      }
      for (int64_t n = 0; n < g.slots; ++n) {
        const T* m = projection + n * 12;
        const int64_t map = map_of ? map_of[n] : n, begin = g.band_begin(n), end = g.band_end(n);
        const int64_t from = first + map * map_stride[2] - begin * map_stride[3];
        int64_t to = 0;
        if constexpr (kBackward) to = first_target + map * grad_stride[2] - begin * grad_stride[3];
        for (int64_t p0 = 0; p0 < tile.pixels; p0 += kWidth<T>) {
          Projected<T> at = project(g, m, samples_at(g, rays, delta, p0));
          if (map < 0) at.contributes = at.seen = Mask<T>{};  // an absent slot, whatever its projection
          // Coordinates of what does not contribute may not fit an integer.
          const Vec<T> x = at.contributes ? at.u - T(0.5) : Vec<T>{}, y = at.contributes ? at.v - T(0.5) : Vec<T>{};
          const Vec<T> left = floor_of(x), top = floor_of(y), fx = x - left, fy = y - top;
          const int64_t lanes = tile.pixels - p0 < kWidth<T> ? tile.pixels - p0 : kWidth<T>;
          for (int64_t l = 0; l < lanes; ++l) {
            const int64_t sample = (p0 + l) * points + k;
            kept[sample] |= at.seen[l] != 0;
            int added = 0;
            if (at.contributes[l]) {
              added = corners(begin, end, g.map_width, sample * per_sample + count[sample], from, map_stride, to,
                              grad_stride, static_cast<int64_t>(left[l]), static_cast<int64_t>(top[l]), fx[l], fy[l]);
              count[sample] += added;
            }
            if constexpr (kBackward) slot_count[sample * g.slots + n] = static_cast<uint8_t>(added);
          }
        }
      }
    }
  }

 private:
  // Those of one sample in the rows [begin, end) of a map.
  int corners(int64_t begin, int64_t end, int64_t width, int64_t at, int64_t map, const int64_t* map_stride,
              int64_t grad, const int64_t* grad_stride, int64_t left, int64_t top, T fx, T fy) {
    const int64_t sy = map_stride[3], sx = map_stride[4];
    const int64_t corner = map + top * sy + left * sx;
    if (left >= 0 && top >= begin && left + 1 < width && top + 1 < end) {
      const int64_t offset[4] = {corner, corner + sx, corner + sy, corner + sy + sx};
      const T w[4] = {(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy};
      __builtin_memcpy(source + at, offset, sizeof(offset));
      __builtin_memcpy(weight + at, w, sizeof(w));
      if constexpr (kBackward) {
        const int64_t ty = grad_stride[3], tx = grad_stride[4], base = grad + top * ty + left * tx;
        const int64_t to[4] = {base, base + tx, base + ty, base + ty + tx};
        const T dx[4] = {fy - 1, 1 - fy, -fy, fy}, dy[4] = {fx - 1, -fx, 1 - fx, fx};
        __builtin_memcpy(target + at, to, sizeof(to));
        __builtin_memcpy(slope_x + at, dx, sizeof(dx));
        __builtin_memcpy(slope_y + at, dy, sizeof(dy));
      }
      return 4;
    }
    int added = 0;
    for (int c = 0; c < 4; ++c) {
      const int right = c & 1, below = c >> 1;
      const int64_t x = left + right, y = top + below;
      if (x < 0 || y < begin || x >= width || y >= end) continue;
      const T wx = right ? fx : 1 - fx, wy = below ? fy : 1 - fy;
      source[at + added] = map + y * sy + x * sx;
      weight[at + added] = wx * wy;
      if constexpr (kBackward) {
        target[at + added] = grad + y * grad_stride[3] + x * grad_stride[4];
        slope_x[at + added] = right ? wy : -wy;
        slope_y[at + added] = below ? wx : -wx;
      }
      ++added;
    }
    return added;
  }
};

}  // namespace
}  // namespace cvc::epipolar
