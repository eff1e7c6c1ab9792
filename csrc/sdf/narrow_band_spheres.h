// Spheres around triangles, one triangle per lane. For isa_narrow_band.cpp alone: everything has internal linkage.
//
// The same spheres as `bounded` (narrow_band_sphere.h) gives, in float32 relative to a corner of a cell at the
// triangle's first vertex. Coordinates are small there, but for long triangles, which are left to float64.
#pragma once

#include "common/simd.h"
#include "sdf/narrow_band.h"
#include "sdf/narrow_band_frames.h"

namespace cvc::narrow_band {
namespace {

// Of a centre and of a radius, together: triangles that end up here have coordinates below 2·kBlock.
constexpr float kSphereError = 1e-5f;
constexpr int32_t kFarCell = 1 << 17;  // numbers of cells that are left to float64 from here on

// Corners t[3 * corner + axis] of kF triangles relative to the corners of cells `base`. Lanes from `count` on repeat
// the last.
template <class Real, class Index>
void load_near_cells(const Mesh<Real, Index>& mesh, const Grid& grid, const Index* faces, int64_t count, F* t,
                     I* base) {
  F4 part[9][kF / 4];
  I4 cell[3][kF / 4];
  for (int group = 0; group < kF / 4; ++group) {
    const Index* face[4];
    for (int l = 0; l < 4; ++l) face[l] = faces + 3 * (4 * group + l < count ? 4 * group + l : count - 1);
    D4 corner_of_cell[3];
    for (int corner = 0; corner < 3; ++corner) {
      const Real* vertex[4];
      for (int l = 0; l < 4; ++l) vertex[l] = mesh.vertices + 3 * static_cast<int64_t>(face[l][corner]);
      D4 column[3];
      load_columns(vertex, column);
      for (int k = 0; k < 3; ++k) {
        const D4 x = column[k] * grid.voxels - grid.low[k] * grid.voxels;
        if (corner == 0) {
          cell[k][group] = truncate(x * (1.0 / kBlock));
          corner_of_cell[k] = __builtin_convertvector(cell[k][group], D4) * double{kBlock};
        }
        part[3 * corner + k][group] = narrow(x - corner_of_cell[k]);
      }
    }
  }
  for (int k = 0; k < 9; ++k) t[k] = join(part[k]);
  for (int k = 0; k < 3; ++k) base[k] = join(cell[k]);
}

inline I floor_to_int(F x) {
  const I toward_zero = __builtin_convertvector(x, I);
  return toward_zero + (x < __builtin_convertvector(toward_zero, F));  // a comparison is -1 where it holds
}

// Spheres of the faces [first, first + count) → out.
template <class Real, class Index>
void measure_spheres(const SphereJob<Real, Index>& job) {
  FaceSpheres& out = *job.out;
  const Index* faces = job.mesh.faces + 3 * job.first;
  bool in_range = true;
  for (int64_t i = 0; i < 3 * job.count; ++i) in_range &= (faces[i] >= 0) & (faces[i] < job.mesh.vertex_count);
  if (!in_range) {  // what is wrong first is found in order
    for (int64_t i = 0; i < job.count; ++i) out.kind[i] = FaceSpheres::kUnusual;
    return;
  }
  const float band = static_cast<float>(job.grid.band) * (1 + 1e-5f) + 0.5f;
  for (int64_t i = 0; i < job.count; i += kF) {
    F t[9];
    I base[3];
    load_near_cells(job.mesh, job.grid, faces + 3 * i, job.count - i, t, base);

    // Squared edges, each by the corner that is opposite to it, and the weights of the corners in the centre: of the
    // circumcentre where all angles are acute, else of the middle of the longest edge.
    F square[3];
    for (int corner = 0; corner < 3; ++corner) {
      const F *from = t + 3 * ((corner + 1) % 3), *to = t + 3 * ((corner + 2) % 3);
      const F x = to[0] - from[0], y = to[1] - from[1], z = to[2] - from[2];
      square[corner] = x * x + y * y + z * z;
    }
    const F longest = vmax(vmax(square[0], square[1]), square[2]), sum = square[0] + square[1] + square[2];
    F weight[3];
    for (int corner = 0; corner < 3; ++corner) weight[corner] = square[corner] * (sum - 2 * square[corner]);
    const F whole = weight[0] + weight[1] + weight[2];
    const I acute = (2 * longest < sum) & (whole > 1e-30f);
    const F scale = 1 / (acute ? whole : F{} + 1);
    const I first = square[0] == longest, second = ~first & (square[1] == longest), third = ~(first | second);
    const I opposite[3] = {first, second, third};
    for (int corner = 0; corner < 3; ++corner)
      weight[corner] = acute ? weight[corner] * scale : opposite[corner] ? F{} : F{} + 0.5f;

    F centre[3], radius2{};
    for (int k = 0; k < 3; ++k) centre[k] = weight[0] * t[k] + weight[1] * t[3 + k] + weight[2] * t[6 + k];
    I here{};
    here = ~here;
    const float most = static_cast<float>(job.largest_radius);
    for (int corner = 0; corner < 9; corner += 3) {
      const F x = t[corner] - centre[0], y = t[corner + 1] - centre[1], z = t[corner + 2] - centre[2];
      const F d2 = x * x + y * y + z * z;
      here &= d2 < most * most;  // false for NaN
      radius2 = vmax(radius2, d2);
    }
    const F radius = root(radius2);

    I outside{}, packed{};
    for (int k = 0; k < 3; ++k) {
      here &= (base[k] < kFarCell) & (base[k] > -kFarCell);
      const I cell = floor_to_int(centre[k] * (1.0f / kBlock));
      const F within = centre[k] - __builtin_convertvector(cell, F) * float{kBlock};
      const I step = __builtin_convertvector(within * (1 / kCentreStep), I);
      packed |= (step > 255 ? I{} + 255 : step) << (8 * k);
      store(out.cell[k] + i, base[k] + cell);
      const F x = __builtin_convertvector(base[k], F) * float{kBlock} + centre[k], reach = radius + band;
      outside |= (x < -reach) | (x > reach + static_cast<float>(job.grid.size[k]));
    }
    const F wide = (radius + (kCentreError + kSphereError)) * (1 / kRadiusStep);
    const I steps = __builtin_convertvector(wide, I) + 1;
    packed |= (steps > 255 ? I{} + 255 : steps) << 24;
    store(reinterpret_cast<int32_t*>(out.packed) + i, packed);
    const I kind = outside ? I{} + int32_t{FaceSpheres::kNone} : I{} + int32_t{FaceSpheres::kOne};
    store(out.kind + i, here ? kind : I{} + int32_t{FaceSpheres::kUnusual});
  }
}

}  // namespace
}  // namespace cvc::narrow_band
