// Oriented boxes around groups of triangles, where triangles are small and many. For isa_narrow_band.cpp alone:
// everything has internal linkage.
//
// A group is kGroup spheres that follow each other along a Morton curve: on a surface, a patch. Its box is centred at a
// vertex near the patch's middle, has one axis along the normal and one towards the vertex that is farthest away, and
// so is as thin as the patch is flat. That matters: seen from the distance D, what encloses triangles with the slack t
// along the line of sight lets through all that are within √(2Dt) of the nearest, and for spheres t is their radius.
#pragma once

#include "common/simd.h"
#include "sdf/narrow_band.h"
#include "sdf/narrow_band_corners.h"
#include "sdf/narrow_band_cull.h"
#include "sdf/narrow_band_frames.h"

namespace cvc::narrow_band {
namespace {

// v without its part along the unit vector e, made of unit length; any unit vector across e if that leaves too little.
inline void across(const float* e, const float* v, float* out) {
  const float along = dot(e, v), whole = dot(v, v), rest = whole - along * along;
  if (rest > 0.01f * whole && rest > 1e-20f) {
    const float scale = 1 / __builtin_sqrtf(rest);
    for (int k = 0; k < 3; ++k) out[k] = (v[k] - along * e[k]) * scale;
    return;
  }
  double axis[3] = {e[0], e[1], e[2]}, other[3]{};
  other[axis[0] * axis[0] > 0.5] = 1;
  orthonormalise(axis, other);
  for (int k = 0; k < 3; ++k) out[k] = static_cast<float>(other[k]);
}

inline void bound_group(const Corners& group, const GroupList& out, int64_t to) {
  float* const* field = out.field;
  // The normal: of all triangles together, each turned to the side of the first's. The middle of their bounding box.
  F sum[3]{}, low[3], high[3];
  float first[3];
  for (int v = 0; v < kVectors; ++v) {
    const F* t = group.t[v];
    F n[3];
    for (int k = 0; k < 3; ++k) {
      const int i = (k + 1) % 3, j = (k + 2) % 3;
      n[k] = (t[3 + i] - t[i]) * (t[6 + j] - t[j]) - (t[3 + j] - t[j]) * (t[6 + i] - t[i]);
    }
    if (v == 0)
      for (int k = 0; k < 3; ++k) first[k] = n[k][0];
    const I away = n[0] * first[0] + n[1] * first[1] + n[2] * first[2] < 0;
    for (int k = 0; k < 3; ++k) {
      sum[k] += away ? -n[k] : n[k];
      const F least = vmin(vmin(t[k], t[3 + k]), t[6 + k]), most = vmax(vmax(t[k], t[3 + k]), t[6 + k]);
      low[k] = v == 0 ? least : vmin(low[k], least);
      high[k] = v == 0 ? most : vmax(high[k], most);
    }
  }
  float middle[3], n[3], u[3], w[3];
  for (int k = 0; k < 3; ++k) {
    middle[k] = 0.5f * (greatest(high[k]) - greatest(-low[k]));
    n[k] = fold(sum[k], [](F a, F b) { return a + b; });
  }
  const float square = dot(n, n), scale = square > 1e-30f ? 1 / __builtin_sqrtf(square) : 0;
  for (int k = 0; k < 3; ++k) n[k] = scale > 0 ? n[k] * scale : k == 2;

  // The vertex nearest to the middle; a centre of a sphere, which is not quite on the surface, if it must be.
  Nearest closest;
  for (int v = 0; v < kVectors; ++v)
    for (int corner = 0; corner < 9; corner += 3) {
      const F* p = group.t[v] + corner;
      const F x = p[0] - middle[0], y = p[1] - middle[1], z = p[2] - middle[2];
      closest.offer(x * x + y * y + z * z + (group.pad[v] > 0 ? F{} + 1e20f : F{}), p[0], p[1], p[2]);
    }
  float c[3];
  closest.centre(c);

  Nearest farthest;
  F pad{};
  for (int v = 0; v < kVectors; ++v) {
    pad = vmax(pad, group.pad[v]);
    for (int corner = 0; corner < 9; corner += 3) {
      const F* p = group.t[v] + corner;
      const F x = p[0] - c[0], y = p[1] - c[1], z = p[2] - c[2];
      farthest.offer(-(x * x + y * y + z * z), x, y, z);
    }
  }
  float far[3];
  farthest.centre(far);
  across(n, far, u);
  for (int k = 0; k < 3; ++k) w[k] = n[(k + 1) % 3] * u[(k + 2) % 3] - n[(k + 2) % 3] * u[(k + 1) % 3];
  F extent[3]{};
  for (int v = 0; v < kVectors; ++v)
    for (int corner = 0; corner < 9; corner += 3) {
      const F* p = group.t[v] + corner;
      const F x = p[0] - c[0], y = p[1] - c[1], z = p[2] - c[2];
      extent[0] = vmax(extent[0], vabs(u[0] * x + u[1] * y + u[2] * z));
      extent[1] = vmax(extent[1], vabs(w[0] * x + w[1] * y + w[2] * z));
      extent[2] = vmax(extent[2], vabs(n[0] * x + n[1] * y + n[2] * z));
    }
  const float room = greatest(pad) + 1e-5f;
  for (int k = 0; k < 3; ++k) {
    field[kX + k][to] = c[k];
    field[kU + k][to] = u[k];
    field[kW + k][to] = w[k];
    field[kExtent + k][to] = greatest(extent[k]) * (1 + 1e-5f) + room;
  }
  field[kReach][to] = __builtin_sqrtf(dot(far, far)) * (1 + 1e-5f) + room;
  field[kOffSurface][to] = -greatest(-closest.best) < 1e19f ? 0 : 1e30f;
}

// Boxes of the groups of a cell, and what vertices they share. Returns how many those are.
template <class Real, class Index>
uint32_t measure_groups(const GroupJob<Real, Index>& job) {
  const float corner[3] = {0, 0, 0};
  VertexTable table;
  uint32_t shared = 0;
  for (uint32_t i = job.begin, to = job.group; i < job.end; i += kGroup, ++to) {
    if (job.end - i >= 3 * kGroup) {
      prefetch_faces(job.mesh, job.spheres.face + i + 2 * kGroup);
      prefetch_vertices(job.mesh, job.spheres.face + i + kGroup);
    }
    const int64_t count = job.end - i < kGroup ? job.end - i : kGroup;
    const Corners group = load_group(job.mesh, job.grid, job.corner, job.spheres, corner, i, count);
    bound_group(group, job.out, to);
    if (count == kGroup && group.whole())
      shared += share_vertices(job.mesh, job.spheres.face + i, group, table, job.vertices, shared, job.packed + i);
  }
  return shared;
}

}  // namespace
}  // namespace cvc::narrow_band
