// The corners of groups of triangles, where triangles are small and many. For isa_narrow_band.cpp alone: everything has
// internal linkage.
//
// The triangles of a patch share their vertices: sixteen have forty-eight corners, but only about eighteen vertices.
// They are found once, and blocks then load those instead, without a look at the faces.
#pragma once

#include <cstring>

#include "common/simd.h"
#include "sdf/narrow_band.h"
#include "sdf/narrow_band_cull.h"
#include "sdf/narrow_band_frames.h"

namespace cvc::narrow_band {
namespace {

constexpr int kVectors = kGroup / kF;  // per group

// A group's faces, then, once they are there, its vertices: they lie scattered over the mesh.
template <class Real, class Index>
inline void prefetch_faces(const Mesh<Real, Index>& mesh, const uint32_t* face) {
  for (int l = 0; l < kGroup; ++l) __builtin_prefetch(mesh.faces + 3 * static_cast<int64_t>(face[l]));
}
template <class Real, class Index>
inline void prefetch_vertices(const Mesh<Real, Index>& mesh, const uint32_t* face) {
  for (int l = 0; l < kGroup; ++l) {
    const Index* corner = mesh.faces + 3 * static_cast<int64_t>(face[l]);
    for (int k = 0; k < 3; ++k) __builtin_prefetch(mesh.vertices + 3 * static_cast<int64_t>(corner[k]));
  }
}

// The corners of a group's triangles, one per lane. For part of a long triangle all three are the centre of its sphere,
// and `pad` is the sphere's radius: it is 0 for other triangles. Lanes beyond the end repeat the first.
struct Corners {
  F t[kVectors][9], pad[kVectors];

  bool whole() const {
    I parts{};
    for (const F& v : pad) parts |= v > 0;
    return !any_lane(parts);
  }
};

template <class Real, class Index>
Corners load_group(const Mesh<Real, Index>& mesh, const Grid& grid, const double* origin, const Spheres& spheres,
                   const float* cell_corner, uint32_t first, int64_t count) {
  Corners group;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = count - v * kF;
    if (left <= 0) {
      for (int k = 0; k < 9; ++k) group.t[v][k] = group.t[0][k];
      group.pad[v] = group.pad[0];
      continue;
    }
    F* const t = group.t[v];
    load_corners(mesh, grid, origin, spheres.face + first + v * kF, left, t);
    const Sphere c = unpack(spheres.packed + first + v * kF, cell_corner);
    F far2{};
    for (int corner = 0; corner < 9; corner += 3) {
      const F x = t[corner] - c.x, y = t[corner + 1] - c.y, z = t[corner + 2] - c.z;
      far2 = vmax(far2, x * x + y * y + z * z);
    }
    const I whole = far2 <= c.r * c.r;
    for (int corner = 0; corner < 9; corner += 3) {
      t[corner] = whole ? t[corner] : c.x;
      t[corner + 1] = whole ? t[corner + 1] : c.y;
      t[corner + 2] = whole ? t[corner + 2] : c.z;
    }
    group.pad[v] = whole ? F{} : c.r;
    if (left < kF) {
      const I here = load<I>(kLaneIndex) < static_cast<int32_t>(left);
      for (int k = 0; k < 9; ++k) t[k] = here ? t[k] : t[k][0] - F{};
      group.pad[v] = here ? group.pad[v] : group.pad[v][0] - F{};
    }
  }
  return group;
}

// At least the squared radius of the smallest circle around triangles t[3 * corner + axis], with l the squares of their
// edges: that is l/4 of the longest if no angle is acute, else at most Σl/8; and never more than l/3.
inline F circle_square(const F* t) {
  F longest{}, sum{};
  for (int corner = 0; corner < 9; corner += 3) {
    const int next = (corner + 3) % 9;
    const F x = t[next] - t[corner], y = t[next + 1] - t[corner + 1], z = t[next + 2] - t[corner + 2];
    const F l = x * x + y * y + z * z;
    longest = vmax(longest, l);
    sum += l;
  }
  return vmin(longest * (1 / 3.0f), vmax(longest * 0.25f, sum * 0.125f));
}

constexpr float kCircleRoom = 1 + 1e-5f;  // for rounding

// Vertices by their hashes, each with the group that it was met in last and its place there.
class VertexTable {
 public:
  void next_group() {
    if (++group_ == 1 << 24) group_ = 1, std::memset(slots_, 0, sizeof(slots_));
  }
  // Looks a vertex up, which is put at `end` of the group's list if it is new. Returns whether it is; its place → at.
  bool add(uint32_t vertex, uint32_t end, uint8_t& at) {
    uint64_t& slot = slots_[vertex * 0x9E3779B1u >> (32 - kBits)];
    const uint64_t same = uint64_t{vertex} << 32 | group_ << 8;
    const bool is_new = (slot ^ same) >> 8 != 0;
    const uint32_t place = static_cast<uint8_t>(slot), mask = 0 - uint32_t{is_new};  // branches would be mispredicted
    at = static_cast<uint8_t>(place ^ ((place ^ end) & mask));
    slot = same | at;
    return is_new;
  }

 private:
  static constexpr int kBits = 9;
  uint64_t slots_[1 << kBits]{};
  uint32_t group_ = 0;
};

// Finds the vertices that a group's triangles share → vertex[begin..), and SharedVertices in the place of its spheres.
// Returns how many there are, or 0 if there are too many. A vertex may be there twice: another may have taken its slot.
template <class Real, class Index>
uint32_t share_vertices(const Mesh<Real, Index>& mesh, const uint32_t* face, const Corners& group, VertexTable& table,
                        uint32_t* vertex, uint32_t begin, uint32_t* packed) {
  if (mesh.vertex_count > int64_t{UINT32_MAX} || begin > UINT32_MAX - SharedVertices::kMost) return 0;
  uint32_t found[3 * kGroup + 1], count = 0;
  SharedVertices shared;
  table.next_group();
  for (int l = 0; l < kGroup; ++l) {
    const Index* corner = mesh.faces + 3 * static_cast<int64_t>(face[l]);
    for (int k = 0; k < 3; ++k) {
      const uint32_t v = static_cast<uint32_t>(corner[k]);
      found[count] = v;
      count += table.add(v, count, shared.corner[k][l]);
    }
  }
  if (count > SharedVertices::kMost) return 0;
  F slack{};
  for (const F* t : group.t) slack = vmax(slack, circle_square(t));
  shared.count = count, shared.begin = begin, shared.slack = greatest(slack) * kCircleRoom;
  std::memcpy(vertex + begin, found, sizeof(uint32_t) * count);
  std::memcpy(packed, &shared, sizeof(shared));
  return count;
}

// The numbers of the vertices that a group shares, or the vertices.
template <bool numbers, class Real, class Index>
inline void prefetch_shared(const Mesh<Real, Index>& mesh, const uint32_t* vertices, const uint32_t* packed) {
  const uint32_t count = packed[0], *const vertex = vertices + packed[1];  // of SharedVertices
  if constexpr (numbers) {
    __builtin_prefetch(vertex);
    __builtin_prefetch(vertex + count - 1);
  } else {
    for (uint32_t i = 0; i < count; ++i) __builtin_prefetch(mesh.vertices + 3 * static_cast<int64_t>(vertex[i]));
  }
}

// The vertices that a group shares → position[axis], as load_corners has them; with some more of the last.
template <class Real, class Index>
void load_shared(const Mesh<Real, Index>& mesh, const Grid& grid, const double* origin, const uint32_t* vertex,
                 int count, float (*position)[SharedVertices::kMost]) {
  double shift[3];
  for (int k = 0; k < 3; ++k) shift[k] = -grid.low[k] * grid.voxels - origin[k];
  for (int i = 0; i < count; i += 4) {
    const Real* at[4];
    for (int l = 0; l < 4; ++l)
      at[l] = mesh.vertices + 3 * static_cast<int64_t>(vertex[i + l < count ? i + l : count - 1]);
    D4 column[3];
    load_columns(at, column);
    for (int k = 0; k < 3; ++k) store(position[k] + i, narrow(column[k] * grid.voxels + shift[k]));
  }
}

}  // namespace
}  // namespace cvc::narrow_band
