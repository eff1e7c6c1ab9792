// Which spheres can matter to a box of voxels. For isa_narrow_band.cpp alone: everything has internal linkage.
#pragma once

#include "common/simd.h"
#include "sdf/narrow_band.h"

namespace cvc::narrow_band {
namespace {

const int32_t kLaneIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The sphere whose centre is nearest to a point, per lane.
struct Nearest {
  F best, x, y, z;

  Nearest() : best(F{} + 1e30f), x{}, y{}, z{} {}
  void offer(F d2, F cx, F cy, F cz) {
    const I closer = d2 < best;
    best = vmin(d2, best);
    x = closer ? cx : x, y = closer ? cy : y, z = closer ? cz : z;
  }
  void centre(float* out) const {
    const int lane = least_lane(best);
    out[0] = x[lane], out[1] = y[lane], out[2] = z[lane];
  }
};

struct Sphere {
  F x, y, z, r;
};
inline Sphere unpack(const uint32_t* packed, const float* corner) {
  const I q = load<I>(reinterpret_cast<const int32_t*>(packed));
  const auto number = [](I v) { return __builtin_convertvector(v, F); };
  const float half = 0.5f * kCentreStep;
  return {number(q & 255) * kCentreStep + (corner[0] + half), number((q >> 8) & 255) * kCentreStep + (corner[1] + half),
          number((q >> 16) & 255) * kCentreStep + (corner[2] + half), number((q >> 24) & 255) * kRadiusStep};
}
inline Sphere at(const SphereList& list, int64_t i) {
  return {load<F>(list.x + i), load<F>(list.y + i), load<F>(list.z + i), load<F>(list.r + i)};
}
// Appends the selected lanes; writes up to a vector beyond them.
inline int64_t append(const SphereList& list, int64_t n, unsigned bits, const Sphere& c, I id) {
  const Packer packer(bits);
  store(list.x + n, pack(packer, c.x));
  store(list.y + n, pack(packer, c.y));
  store(list.z + n, pack(packer, c.z));
  store(list.r + n, pack(packer, c.r));
  store(reinterpret_cast<int32_t*>(list.id) + n, packer(id));
  return n + __builtin_popcount(bits);
}
// Bits of the lanes before the end of a list, `left` elements on.
inline unsigned lanes_left(int64_t left) { return left < kF ? (1u << left) - 1 : ~0u; }

// A box of voxel centres (centre b, half extents e) and the centre p of a sphere, which lies on the surface up to the
// rounding of packed centres: what decides whether another sphere can matter to the box.
struct Box {
  F b[3], p[3], e[3], e2[3];  // e2 = 2 e
  F base, twice_u, band;      // |b - p|² + slack, 2 U

  Box(const float* centre, const float* half, const float* point, float reach) {
    float near2 = 0, far2 = 0;
    for (int k = 0; k < 3; ++k) {
      const float d = centre[k] - point[k], far = (d < 0 ? -d : d) + half[k];
      b[k] = centre[k] - F{};
      p[k] = point[k] - F{};
      e[k] = half[k] - F{};
      e2[k] = 2 * half[k] - F{};
      near2 += d * d;
      far2 += far * far;
    }
    base = near2 + (1e-4f + 4e-6f * far2) - F{};
    twice_u = 2 * __builtin_sqrtf(far2) - F{};
    band = reach - F{};
  }
  // Is all of the box certainly in the band?
  bool inside_band() const { return twice_u[0] + 2 * kCentreError < 2 * band[0]; }

  template <bool with_band>
  I matters(const Sphere& c) const {
    const F dx = c.x - b[0], dy = c.y - b[1], dz = c.z - b[2];
    const F linear = e2[0] * vabs(c.x - p[0]) + e2[1] * vabs(c.y - p[1]) + e2[2] * vabs(c.z - p[2]);
    const F s = c.r + kCentreError;
    I keep = dx * dx + dy * dy + dz * dz - linear < base + s * (twice_u + s);
    if constexpr (with_band) {
      const F gx = vmax(vabs(dx) - e[0], F{}), gy = vmax(vabs(dy) - e[1], F{}), gz = vmax(vabs(dz) - e[2], F{});
      const F reach = band + c.r;
      keep &= gx * gx + gy * gy + gz * gz <= reach * reach;
    }
    return keep;
  }
};

}  // namespace
}  // namespace cvc::narrow_band
