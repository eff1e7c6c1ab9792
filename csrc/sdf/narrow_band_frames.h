// Triangles in frames of their own, in which distances need no branches. For isa_narrow_band.cpp alone: everything has
// internal linkage.
#pragma once

#include "common/simd.h"
#include "sdf/narrow_band.h"

namespace cvc::narrow_band {
namespace {

// A triangle's own frame, relative to the block's centre; T is a number, or a vector with one triangle per lane.
template <class T>
struct Frame {
  T e1[3], e2[3], n[3];     // orthonormal; e1 along the longest edge a→b, the third vertex c on the side of e2
  T height;                 // n · a
  T ab_low, ab_high, ab_v;  // the edge a→b: its range of u = e1·x, and its v = e2·x
  struct Edge {             // in (u, v): unit direction, range along it, and signed offset of its line
    T u, v, low, high, offset;
  } bc, ca;
};
constexpr int kFields = sizeof(Frame<float>) / sizeof(float);

// Frames of triangles are stored as kStride numbers each.
template <class Real>
constexpr int kStride = (kFields + kWidth<Real> - 1) / kWidth<Real> * kWidth<Real>;
template <class Real>
inline const Frame<Real>& frame_at(const Real* frames, uint32_t i) {
  return *reinterpret_cast<const Frame<Real>*>(frames + static_cast<int64_t>(i) * kStride<Real>);
}

template <class T>
inline T dot(const T* a, const T* b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

// 1/√x, or 0 for squared lengths (in voxels) so small that they are about to lose their digits.
template <class T>
inline T inverse_root(T x) {
  return x > 1e-30f ? 1 / root(x) : T{};
}

// The edge from (u, v) over (du, dv). Steps are given apart from positions, and never taken as their difference: a
// small triangle's would be noise, and lines that do not close leave an "inside" that reaches far out. An edge without
// length points against e1, as the long way back would: then it and a→b never both have a point inside.
template <class T>
inline typename Frame<T>::Edge edge_from(T u, T v, T du, T dv) {
  const T length2 = du * du + dv * dv, scale = inverse_root(length2);
  const T tu = scale > 0 ? du * scale : T{} - 1, tv = dv * scale, low = u * tu + v * tv;
  return {tu, tv, low, low + length2 * scale, u * tv - v * tu};
}

// Makes v, made of unit length, perpendicular to the unit vector e: in two passes, because v may nearly be parallel to
// it. What the first leaves of a parallel v is rounding, again in any direction; when the second takes most of it away,
// v is 0.
template <class T>
inline void orthonormalise(const T* e, T* v) {
  for (int pass = 0; pass < 2; ++pass) {
    const T along = dot(v, e);
    for (int k = 0; k < 3; ++k) v[k] -= along * e[k];
    const T rest = dot(v, v), least = T{} + (pass == 0 ? 0.0f : 0.5f), scale = rest > least ? inverse_root(rest) : T{};
    for (int k = 0; k < 3; ++k) v[k] *= scale;
  }
}

// Triangles may be needles, segments or points: without an extent across e1 any e2 does, because then the inside test
// decides nothing (see distances).
template <class T>
inline Frame<T> frame_of(const T* t) {
  T ab[3], bc[3], ca[3];
  for (int k = 0; k < 3; ++k) ab[k] = t[3 + k] - t[k], bc[k] = t[6 + k] - t[3 + k], ca[k] = t[k] - t[6 + k];
  const T lab = dot(ab, ab), lbc = dot(bc, bc), lca = dot(ca, ca);
  // Rotate the names so that a→b is the longest edge: the foot of c then lies between a and b.
  const auto use_bc = (lbc > lab) & (lbc >= lca), use_ca = (lca > lab) & (lca > lbc);
  const T longest = use_bc ? lbc : use_ca ? lca : lab;
  const T inverse = inverse_root(longest);
  Frame<T> f;
  T a[3], ac[3];
  for (int k = 0; k < 3; ++k) {
    a[k] = use_bc ? t[3 + k] : use_ca ? t[6 + k] : t[k];
    f.e1[k] = (use_bc ? bc[k] : use_ca ? ca[k] : ab[k]) * inverse;
    ac[k] = (use_bc ? t[k] : use_ca ? t[3 + k] : t[6 + k]) - a[k];
    f.e2[k] = ac[k];
  }
  f.e1[0] = inverse > 0 ? f.e1[0] : T{} + 1;
  orthonormalise(f.e1, f.e2);
  const auto flat = !(dot(f.e2, f.e2) > T{} + 0.5f);
  if (any_lane(flat)) {
    const auto along_x = f.e1[0] * f.e1[0] > T{} + 0.5f;
    T other[3] = {along_x ? T{} : T{} + 1, along_x ? T{} + 1 : T{}, T{}};
    orthonormalise(f.e1, other);
    for (int k = 0; k < 3; ++k) f.e2[k] = flat ? other[k] : f.e2[k];
  }
  for (int k = 0; k < 3; ++k) f.n[k] = f.e1[(k + 1) % 3] * f.e2[(k + 2) % 3] - f.e1[(k + 2) % 3] * f.e2[(k + 1) % 3];
  const T ua = dot(a, f.e1), va = dot(a, f.e2), ub = ua + longest * inverse;
  const T along = dot(ac, f.e1), across = dot(ac, f.e2);
  f.height = dot(a, f.n);
  f.ab_low = ua, f.ab_high = ub, f.ab_v = va;
  f.bc = edge_from(ub, va, along - longest * inverse, across);
  f.ca = edge_from(ua + along, va + across, -along, -across);
  return f;
}

// Triangles farther out than this, which only large ones are where it matters, are put into their frame in float64.
constexpr float kFar = 32;

template <class Real, class Index>
void make_frame(const Job<Real, Index>& job, uint32_t face, Real* out) {
  double t[9];
  for (int corner = 0; corner < 3; ++corner) {
    const Real* v =
        job.mesh.vertices + 3 * static_cast<int64_t>(job.mesh.faces[3 * static_cast<int64_t>(face) + corner]);
    for (int k = 0; k < 3; ++k) t[3 * corner + k] = (v[k] - job.grid.low[k]) * job.grid.voxels - job.centre[k];
  }
  const Frame<double> frame = frame_of(t);
  const double* field = reinterpret_cast<const double*>(&frame);
  for (int k = 0; k < kFields; ++k) out[k] = static_cast<Real>(field[k]);
}

// Coordinates of four vertices, by axis.
inline void load_columns(const float* const* vertex, D4* column) {
  F4 row[4];
  for (int l = 0; l < 4; ++l) row[l] = load3(vertex[l]);
  const F4 xy01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5),
           xy23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const F4 z01 = __builtin_shufflevector(row[0], row[1], 2, 6, 2, 6),
           z23 = __builtin_shufflevector(row[2], row[3], 2, 6, 2, 6);
  column[0] = widen(__builtin_shufflevector(xy01, xy23, 0, 1, 4, 5));
  column[1] = widen(__builtin_shufflevector(xy01, xy23, 2, 3, 6, 7));
  column[2] = widen(__builtin_shufflevector(z01, z23, 0, 1, 4, 5));
}
inline void load_columns(const double* const* vertex, D4* column) {
  for (int k = 0; k < 3; ++k) column[k] = D4{vertex[0][k], vertex[1][k], vertex[2][k], vertex[3][k]};
}

// Corners of kF triangles relative to an origin in voxels, one triangle per lane: t[3 * corner + axis]. Lanes beyond
// `count` repeat the first.
template <class Index>
void load_corners(const Mesh<float, Index>& mesh, const Grid& grid, const double* origin, const uint32_t* faces,
                  int64_t count, F* t) {
  double shift[3];
  for (int k = 0; k < 3; ++k) shift[k] = -grid.low[k] * grid.voxels - origin[k];
  // Four triangles at a time, through float64, without a detour over memory.
  F4 part[9][kF / 4];
  for (int group = 0; group < kF / 4; ++group) {
    const Index* face[4];
    for (int l = 0; l < 4; ++l)
      face[l] = mesh.faces + 3 * static_cast<int64_t>(faces[4 * group + l < count ? 4 * group + l : 0]);
    for (int corner = 0; corner < 3; ++corner) {
      const float* vertex[4];
      for (int l = 0; l < 4; ++l) vertex[l] = mesh.vertices + 3 * static_cast<int64_t>(face[l][corner]);
      D4 column[3];
      load_columns(vertex, column);
      for (int k = 0; k < 3; ++k) part[3 * corner + k][group] = narrow(column[k] * grid.voxels + shift[k]);
    }
  }
  for (int k = 0; k < 9; ++k) t[k] = join(part[k]);
}
template <class Index>
void load_corners(const Mesh<double, Index>& mesh, const Grid& grid, const double* origin, const uint32_t* faces,
                  int64_t count, F* t) {
  for (int l = 0; l < kF; ++l)
    for (int corner = 0; corner < 3; ++corner) {
      const double* v =
          mesh.vertices +
          3 * static_cast<int64_t>(mesh.faces[3 * static_cast<int64_t>(faces[l < count ? l : 0]) + corner]);
      for (int k = 0; k < 3; ++k)
        t[3 * corner + k][l] = static_cast<float>((v[k] - grid.low[k]) * grid.voxels - origin[k]);
    }
}

// Frames of at most kF triangles, whose corners are known.
template <class Index>
void make_frames(const Job<float, Index>& job, const uint32_t* faces, int64_t count, const F* t, float* out) {
  F farthest{};
  for (int k = 0; k < 9; ++k) farthest = vmax(farthest, vabs(t[k]));
  const Frame<F> frame = frame_of(t);
  const F* field = reinterpret_cast<const F*>(&frame);
  for (int k = 0; k < kFields; k += kF) {
    F part[kF];
    for (int l = 0; l < kF; ++l) part[l] = k + l < kFields ? field[k + l] : F{};
    transpose(part);
    for (int l = 0; l < kF && l < count; ++l) store(out + l * kStride<float> + k, part[l]);
  }
  for (unsigned bits = lane_bits(!(farthest < kFar)); bits; bits &= bits - 1) {
    const int64_t far = __builtin_ctz(bits);
    if (far < count) make_frame(job, faces[far], out + far * kStride<float>);
  }
}
template <class Index>
void make_frames(const Job<double, Index>& job, const uint32_t* faces, int64_t count, const F*, double* out) {
  for (int64_t i = 0; i < kF && i < count; ++i) make_frame(job, faces[i], out + i * kStride<double>);
}

// Frames of a vector of a group's triangles, of which `count` are the group's, whose corners are known: as many in one
// Frame as a vector of Real has lanes.
template <class Index>
void make_frames(const Job<float, Index>& job, const uint32_t* faces, int64_t count, const F* t, Frame<F>* out) {
  *out = frame_of(t);
  F farthest{};
  for (int k = 0; k < 9; ++k) farthest = vmax(farthest, vabs(t[k]));
  for (unsigned bits = lane_bits(!(farthest < kFar)); bits; bits &= bits - 1) {
    const int far = __builtin_ctz(bits);
    float one[kFields];
    make_frame(job, faces[far < count ? far : 0], one);
    for (int k = 0; k < kFields; ++k) reinterpret_cast<F*>(out)[k][far] = one[k];
  }
}
template <class Index>
void make_frames(const Job<double, Index>& job, const uint32_t* faces, int64_t count, const F*,
                 Frame<Vec<double>>* out) {
  for (int l = 0; l < kF; ++l) {
    double one[kFields];
    make_frame(job, faces[l < count ? l : 0], one);
    Vec<double>* const fields = reinterpret_cast<Vec<double>*>(out + l / kWidth<double>);
    for (int k = 0; k < kFields; ++k) fields[k][l % kWidth<double>] = one[k];
  }
}

template <class Real, class Index>
void make_frames(const Job<Real, Index>& job, const uint32_t* faces, int64_t count, Real* out) {
  for (int64_t i = 0; i < count; i += kF) {
    F t[9];
    if constexpr (sizeof(Real) == 4) load_corners(job.mesh, job.grid, job.centre, faces + i, count - i, t);
    make_frames(job, faces + i, count - i, t, out + i * kStride<Real>);
  }
}

}  // namespace
}  // namespace cvc::narrow_band
