// Where samples fall, without their features: gradients by coordinates on to depth and cameras, and the rows of the
// neighbours' maps that are read at all. For isa_*.cpp only.
#pragma once

#include "epipolar/taps.h"

namespace cvc::epipolar {
namespace {

// The chain from coordinates to depth and cameras, a vector of pixels at a time.
template <class T>
void coordinates_tile(const Geometry<T>& g, const Tile& tile, const T* grad_coordinate, int64_t blocks, T* grad_depth,
                      double* sums) {
  using V = Vec<T>;
  const PixelRays<T> rays(g, tile);
  const T* projection = g.projection + (tile.b * g.queries + tile.q) * g.slots * 12;
  T by_depth[kLanes] = {};
  for (int64_t k = 0; k < g.points; ++k) {
    T delta[kLanes] = {};
    load_jitter(g, tile, k, delta);
    for (int64_t p = 0; p < tile.pixels; p += kWidth<T>) {
      const Samples<T> s = samples_at(g, rays, delta, p);
      V by_x{}, by_y{}, by_t{};  // the sample in the reference camera's frame
      for (int64_t n = 0; n < g.slots; ++n) {
        const T* m = projection + n * 12;
        const Projected<T> at = project(g, m, s);
        V by_u{}, by_v{};
        for (int64_t l = 0; l < kWidth<T> && p + l < tile.pixels; ++l) {
          const int64_t pixel = tile.i(p + l) * g.width + tile.j(p + l);
          for (int64_t block = 0; block < blocks; ++block) {
            const T* grad = grad_coordinate + (((block * g.pixels() + pixel) * g.points + k) * g.slots + n) * 2;
            by_u[l] += grad[0], by_v[l] += grad[1];
          }
        }
        const V none{};
        const V h[3] = {by_u * at.inverse_z, by_v * at.inverse_z,
                        g.ortho ? none : -(by_u * at.u + by_v * at.v) * at.inverse_z};
        V into[3] = {};
        for (int r = 0; r < 3; ++r) {
          const V row = at.contributes ? h[r] : none;
          const V column[4] = {row * s.x, row * s.y, row * s.t, row};
          for (int c = 0; c < 4; ++c) sums[6 + n * 12 + r * 4 + c] += sum_of<T>(at.contributes ? column[c] : none);
          for (int c = 0; c < 3; ++c) into[c] += m[r * 4 + c] * row;
        }
        by_x += at.contributes ? into[0] : none, by_y += at.contributes ? into[1] : none;
        by_t += at.contributes ? into[2] : none;
      }
      const V x = load<V>(rays.x + p), y = load<V>(rays.y + p);
      V ray_x = by_x, ray_y = by_y;
      if (!g.ortho) {
        by_t = x * by_x + y * by_y + by_t;
        ray_x = s.t * by_x, ray_y = s.t * by_y;
        if (g.along_ray) {
          const V inverse = load<V>(rays.inverse_norm + p), bend = s.delta * inverse * inverse * inverse * by_t;
          ray_x -= x * bend, ray_y -= y * bend;
        }
      }
      const Mask<T> real = load<V>(rays.depth + p) == load<V>(rays.depth + p);  // false for NaN: void pixels
      store(by_depth + p, load<V>(by_depth + p) + by_t);
      const V a = load<V>(rays.a + p), b = load<V>(rays.b + p);
      ray_x = real ? ray_x : V{}, ray_y = real ? ray_y : V{};
      sums[0] += sum_of<T>(ray_x * a), sums[1] += sum_of<T>(ray_x * b), sums[2] += sum_of<T>(ray_x);
      sums[3] += sum_of<T>(ray_y * a), sums[4] += sum_of<T>(ray_y * b), sums[5] += sum_of<T>(ray_y);
    }
  }
  for (int64_t p = 0; p < tile.pixels; ++p)
    grad_depth[tile.i(p) * g.width + tile.j(p)] = rays.is_void[p] ? T(0) : by_depth[p];
}

template <class T>
void coordinates(const Geometry<T>& g, const Tiling& tiling, int64_t image, int64_t begin, int64_t end,
                 const T* grad_coordinate, int64_t blocks, T* grad_depth, double* sums) {
  for (int64_t t = begin; t < end; ++t)
    coordinates_tile(g, tile_at(g, tiling, image * tiling.per_image() + t), grad_coordinate, blocks, grad_depth,
                     sums + t * (6 + 12 * g.slots));
}

// The rows that the samples of a tile touch, [N, 2]; an empty range at the end where they touch none.
template <class T>
void reach_tile(const Geometry<T>& g, const Tile& tile, int64_t* rows) {
  using V = Vec<T>;
  const PixelRays<T> rays(g, tile);
  const T* projection = g.projection + (tile.b * g.queries + tile.q) * g.slots * 12;
  const T height = static_cast<T>(g.map_height);
  for (int64_t n = 0; n < g.slots; ++n) rows[2 * n] = g.map_height, rows[2 * n + 1] = 0;
  for (int64_t k = 0; k < g.points; ++k) {
    T delta[kLanes] = {};
    load_jitter(g, tile, k, delta);
    for (int64_t n = 0; n < g.slots; ++n) {
      V lowest = broadcast(height), highest = broadcast(T(-2));
      for (int64_t p = 0; p < tile.pixels; p += kWidth<T>) {
        const Projected<T> at = project(g, projection + n * 12, samples_at(g, rays, delta, p));
        const V top = floor_of(at.contributes ? at.v - T(0.5) : V{});
        lowest = at.contributes & (top < lowest) ? top : lowest;
        highest = at.contributes & (top > highest) ? top : highest;
      }
      for (int l = 0; l < kWidth<T>; ++l) {
        const int64_t first = static_cast<int64_t>(lowest[l]), last = static_cast<int64_t>(highest[l]) + 2;
        if (first < rows[2 * n]) rows[2 * n] = first < 0 ? 0 : first;
        if (last > rows[2 * n + 1]) rows[2 * n + 1] = last > g.map_height ? g.map_height : last;
      }
    }
  }
}

template <class T>
void reach(const Geometry<T>& g, const Tiling& tiling, int64_t begin, int64_t end, int64_t* rows) {
  for (int64_t t = begin; t < end; ++t) reach_tile(g, tile_at(g, tiling, t), rows + t * g.slots * 2);
}

}  // namespace
}  // namespace cvc::epipolar
