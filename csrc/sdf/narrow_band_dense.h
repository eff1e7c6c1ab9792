// One block where triangles are much smaller than a voxel. For isa_narrow_band.cpp alone: everything has internal
// linkage.
//
// Spheres around triangles are poor bounds then: seen from the distance D one of radius r may hide a point nearer by
// r (2D + r) in square, so that hundreds of triangles stay candidates for a voxel. Two sharper bounds cull instead:
//
// - Groups of triangles by the distance to their oriented boxes (narrow_band_group_boxes.h), voxel by voxel.
// - For every voxel, groups by the vertices of their triangles. For a point t = Σ λ_i v_i of the triangle
//     |x - t|² = Σ λ_i |x - v_i|² - Σ_{i<j} λ_i λ_j |v_i - v_j|²  >=  min_i |x - v_i|² - r²,
//   because the last sum is the variance of the weighted vertices, at most the squared radius r² of the smallest circle
//   around them. The slack r² does not grow with the distance.
//
// What they are compared with, the least distance of a voxel to a vertex, is nearly as good as the exact one. What is
// left are pairs of a group and a voxel, which are measured with a triangle per lane (Bricks::Measured).
#pragma once

#include "common/simd.h"
#include "sdf/narrow_band.h"
#include "sdf/narrow_band_bricks.h"
#include "sdf/narrow_band_corners.h"
#include "sdf/narrow_band_cull.h"
#include "sdf/narrow_band_frames.h"

namespace cvc::narrow_band {
namespace {

constexpr float kOffSurfaceSlack = 1e29f;  // more than any other

constexpr int kDenseLanes = kF < 8 ? 8 : 16;

template <class Real, class Index>
struct DenseBlock : Bricks<Real, Index, kDenseLanes> {
  using Base = Bricks<Real, Index, kDenseLanes>;
  using Base::band, Base::frames, Base::job, Base::kDeep, Base::kHalf, Base::kFrames, Base::kLanes;
  using typename Base::Bound, typename Base::Spread, typename Base::Measured, typename Base::Int, typename Base::V;

  const GroupScratch& s = job.scratch->groups;
  float reach = 0;     // at least the distance of any of the block's voxels to the surface
  int64_t loaded = 0;  // groups
  // For rounding of squared distances to points less |x|²: points that matter are not farther out than this.
  const float point_room = 1e-4f + 1.5e-6f * (band + 16) * (band + 16);

  // A group that was loaded: the vertices that its triangles share (narrow_band_corners.h), or else all of their
  // corners, first all first ones, and so on. Points v are kept as -2v and |v|² - slack, where the slack is how much
  // nearer than the nearest corner a triangle may be, in square: less |x|², squared distances are linear in the voxel
  // x.
  struct Members {
    static constexpr int kMost = 3 * kGroup;
    alignas(64) float twice[3][kMost], square[kMost];
    float slack[kMost];  // large where the points are none of the triangles'
    int32_t points;
    bool shared;
    uint8_t corner[3][kGroup];  // if shared
  };
  static_assert(sizeof(Members) <= kMemberBytes);
  Members* const members = static_cast<Members*>(s.members);

  using Base::Base;

  static Sphere sphere(const GroupList& list, int64_t i) {
    return {load<F>(list.field[kX] + i), load<F>(list.field[kX + 1] + i), load<F>(list.field[kX + 2] + i),
            load<F>(list.field[kReach] + i)};
  }

  // Groups around the block that matter to it → s.block. Returns how many.
  int64_t gather() {
    float* const* field = job.groups.field;
    const auto sphere_of = [&](const SphereRun& run, int64_t i) {
      return Sphere{load<F>(field[kX] + i) + run.corner[0], load<F>(field[kX + 1] + i) + run.corner[1],
                    load<F>(field[kX + 2] + i) + run.corner[2], load<F>(field[kReach] + i)};
    };
    const auto group_count = [](const SphereRun& run) { return (run.end - run.begin + kGroup - 1) / kGroup; };
    Nearest closest;
    for (int64_t k = 0; k < job.run_count; ++k) {
      const SphereRun& run = job.runs[k];
      for (int64_t i = 0, n = group_count(run); i < n; i += kF) {
        const Sphere c = sphere_of(run, run.group + i);
        const F d2 = c.x * c.x + c.y * c.y + c.z * c.z;
        closest.offer(load<I>(kLaneIndex) < static_cast<int32_t>(n - i) ? d2 : F{} + 1e30f, c.x, c.y, c.z);
      }
    }
    const float centre[3] = {0, 0, 0}, half[3] = {3.5f, 3.5f, 3.5f};
    float point[3];
    closest.centre(point);
    const Box box(centre, half, point, band);
    reach = 0.5f * box.twice_u[0] + kCentreError;
    int64_t count = 0;
    for (int64_t k = 0; k < job.run_count; ++k) {
      const SphereRun& run = job.runs[k];
      for (int64_t i = 0, n = group_count(run); i < n; i += kF) {
        const Sphere c = sphere_of(run, run.group + i);
        const unsigned bits = lane_bits(box.matters<true>(c)) & lanes_left(n - i);
        if (!bits) continue;
        const Packer packer(bits);
        store(s.block.field[kX] + count, pack(packer, c.x));
        store(s.block.field[kX + 1] + count, pack(packer, c.y));
        store(s.block.field[kX + 2] + count, pack(packer, c.z));
        for (int f = kReach; f < kGroupFields; ++f)
          store(s.block.field[f] + count, pack(packer, load<F>(field[f] + run.group + i)));
        const I lane = load<I>(kLaneIndex) + static_cast<int32_t>(i);
        store(reinterpret_cast<int32_t*>(s.first) + count, packer(lane * kGroup + static_cast<int32_t>(run.begin)));
        store(s.run + count, I{} + static_cast<int32_t>(k));
        store(s.slot + count, I{} - 1);
        store(s.block.id + count, load<I>(kLaneIndex) + static_cast<int32_t>(count));
        count += __builtin_popcount(bits);
      }
    }
    return count;
  }

  // The third axis of boxes.
  static void normal(const GroupList& list, int64_t i, F* n) {
    const auto field = [&](int f, int k) { return load<F>(list.field[f + k % 3] + i); };
    for (int k = 0; k < 3; ++k) n[k] = field(kU, k + 1) * field(kW, k + 2) - field(kU, k + 2) * field(kW, k + 1);
  }

  // Of n groups those that matter to a box of voxels → to, as those of s.block.
  int64_t cull(const GroupList& from, int64_t n, const float* centre, const float* half, const GroupList& to) {
    Nearest closest;
    for (int64_t i = 0; i < n; i += kF) {
      const Sphere c = sphere(from, i);
      const F dx = c.x - centre[0], dy = c.y - centre[1], dz = c.z - centre[2];
      const F d2 = dx * dx + dy * dy + dz * dz;
      closest.offer(load<I>(kLaneIndex) < static_cast<int32_t>(n - i) ? d2 : F{} + 1e30f, c.x, c.y, c.z);
    }
    float point[3];
    closest.centre(point);
    const Box box(centre, half, point, band);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kF) {
      const Sphere c = sphere(from, i);
      unsigned bits = lane_bits(box.matters<true>(c)) & lanes_left(n - i);
      if (!bits) continue;
      // Patches are thin: where the band ends is seen across them.
      F axis[3];
      normal(from, i, axis);
      const F height = vabs(axis[0] * (c.x - centre[0]) + axis[1] * (c.y - centre[1]) + axis[2] * (c.z - centre[2]));
      const F reach = band + 1e-4f + load<F>(from.field[kExtent + 2] + i) + half[0] * vabs(axis[0]) +
                      half[1] * vabs(axis[1]) + half[2] * vabs(axis[2]);
      bits &= lane_bits(height < reach * (1 + 1e-5f));
      if (!bits) continue;
      const Packer packer(bits);
      for (int f = 0; f < kGroupFields; ++f) store(to.field[f] + count, pack(packer, load<F>(from.field[f] + i)));
      store(to.id + count, packer(load<I>(from.id + i)));
      count += __builtin_popcount(bits);
    }
    return count;
  }

  // By voxel: squares of distances that can matter, with room for rounding; none beyond the band does.
  struct Limit {
    alignas(64) float most[kLanes];

    void operator()(const Bound& bound, float band, float room) {
      for (int k = 0; k < kLanes; k += kF) {
        const F least = vmin(load<F>(bound.least + k), F{} + band * band);
        store(most + k, least + (room + 4e-6f * least));
      }
    }
    // Is a voxel's number below its limit?
    template <class Number>
    I any(const Number& number) const {
      F least{};
      for (int l = 0; l < 4; ++l)
        for (int k = 0; k < kDeep; ++k) least = vmin(least, number(l, k) - most[l * kDeep + k]);
      return least < 0;
    }
  };

  Spread squares_of_centres(int64_t i, const float* centre) const {
    const Sphere c = sphere(s.brick, i);
    return Base::squares(c.x - centre[0], c.y - centre[1], c.z - centre[2], load<F>(s.brick.field[kOffSurface] + i));
  }

  // Voxels of a brick relative to the block's centre, |x|² of them, and what is least of something.
  struct Voxels {
    static constexpr int kParts = kLanes / kF;
    F x[kParts][3], square[kParts], least[kParts];

    explicit Voxels(const int* first) {
      for (int part = 0; part < kParts; ++part) {
        for (int k = 0; k < 3; ++k) x[part][k] = load<F>(Base::kOffset.of[k] + part * kF) + (first[k] - 3.5f);
        square[part] = dot(x[part], x[part]);
      }
    }
    // Squared distances to the members' points, less |x|² and the slack, or without it.
    template <bool with_slack>
    void offer(const Members& m) {
      for (int part = 0; part < kParts; ++part) {
        const F a = x[part][0], b = x[part][1], c = x[part][2];
        F nearest = least[part];
        for (int i = 0; i < m.points; ++i) {
          const float square = with_slack ? m.square[i] : m.square[i] + m.slack[i];
          nearest = vmin(nearest, m.twice[0][i] * a + (m.twice[1][i] * b + (m.twice[2][i] * c + square)));
        }
        least[part] = nearest;
      }
    }
  };

  // The voxels, as bits, that some of the members' points are near to.
  static unsigned near_voxels(const Members& m, Voxels& voxels, const Limit& limit) {
    for (F& v : voxels.least) v = F{} + 1e30f;
    voxels.template offer<true>(m);
    unsigned bits = 0;
    for (int part = 0; part < Voxels::kParts; ++part)
      bits |= lane_bits(voxels.least[part] < load<F>(limit.most + part * kF)) << (part * kF);
    return bits;
  }

  // Is the box of a group of s.brick near enough to some voxel?
  I near_enough(int64_t i, const float* centre, const Limit& limit) const {
    const auto field = [&](int f) { return load<F>(s.brick.field[f] + i); };
    F axis[3][3], from[3];
    for (int k = 0; k < 3; ++k)
      axis[0][k] = field(kU + k), axis[1][k] = field(kW + k), from[k] = centre[k] - field(kX + k);
    normal(s.brick, i, axis[2]);
    Spread along[3];
    F extent[3];
    for (int a = 0; a < 3; ++a) {
      along[a] = Base::linear(dot(axis[a], from), axis[a][0], axis[a][1], axis[a][2]);
      extent[a] = field(kExtent + a);
    }
    return limit.any([&](int l, int k) {
      F d2{};
      for (int a = 0; a < 3; ++a) {
        const F out = vmax(vabs(along[a](l, k)) - extent[a], F{});
        d2 += out * out;
      }
      return d2;
    });
  }

  // Makes the groups of s.kept known by their slots; loads those that have none. False when there is no room.
  bool load_groups(int64_t from, int64_t to) {
    int64_t n = 0;
    for (int64_t i = from; i < to; ++i) {
      s.waiting[n] = s.kept[i];
      n += s.slot[s.kept[i]] < 0;
    }
    for (int64_t i = 0; i < n; ++i) prefetch<0>(s.waiting[i]);
    for (int64_t i = 0; i < n; ++i) prefetch<1>(s.waiting[i]);
    for (int64_t i = 0; i < n; ++i) prefetch<2>(s.waiting[i]);
    for (int64_t i = 0; i < n; ++i)
      if (!load_members(s.waiting[i])) return false;
    for (int64_t i = from; i < to; ++i) s.kept[i] = s.slot[s.kept[i]];
    return true;
  }

  // What is needed to load a group, in three steps: each looks at what the one before has asked for.
  template <int step>
  void prefetch(int32_t i) const {
    const uint32_t *packed = job.spheres.packed + s.first[i], *face = job.spheres.face + s.first[i];
    if constexpr (step == 0) {
      __builtin_prefetch(packed);
      __builtin_prefetch(packed + kGroup - 1);
      __builtin_prefetch(face);
      __builtin_prefetch(face + kGroup - 1);
    } else if (SharedVertices::are_at(packed)) {
      prefetch_shared<step == 1>(job.mesh, job.runs[s.run[i]].vertices, packed);
    } else if constexpr (step == 1) {
      prefetch_faces(job.mesh, face);
    } else {
      prefetch_vertices(job.mesh, face);
    }
  }

  // Measures the brick whose first voxel is `first` against the groups of s.brick. False when there is no room.
  bool refine(int64_t count, const int* first, const float* centre) {
    for (int k = 0; k < 3; ++k) store(s.brick.field[kX + k] + count, F{} + 1e10f);  // fills the last vector
    store(s.brick.field[kOffSurface] + count, F{});
    // Groups whose centres are nearest to some voxel: their vertices are the better bound.
    Bound bound;
    for (int64_t i = 0; i < count; i += kF) bound.offer(squares_of_centres(i, centre));
    bound.settle();
    Limit limit;
    for (int k = 0; k < kLanes; ++k) {
      const float least = bound.least[k];
      limit.most[k] = least < (band + 0.5f) * (band + 0.5f) ? least + (1e-4f + 1e-4f * least) : 0;
    }
    int64_t nearest = 0;
    for (int64_t i = 0; i < count; i += kF)
      nearest += keep(nearest, limit.any(squares_of_centres(i, centre)), i, count);
    if (!load_groups(0, nearest)) return false;
    Voxels voxels(first);
    for (int part = 0; part < Voxels::kParts; ++part)
      voxels.least[part] = load<F>(bound.least + part * kF) - voxels.square[part];
    for (int64_t i = 0; i < nearest; ++i) voxels.template offer<false>(members[s.kept[i]]);
    for (int part = 0; part < Voxels::kParts; ++part)
      store(bound.least + part * kF, vmax(voxels.least[part] + voxels.square[part], F{}));
    limit(bound, band, point_room);

    int64_t kept = 0;
    for (int64_t i = 0; i < count; i += kF) kept += keep(kept, near_enough(i, centre, limit), i, count);
    if (!load_groups(0, kept)) return false;
    for (int part = 0; part < Voxels::kParts; ++part)
      store(limit.most + part * kF, load<F>(limit.most + part * kF) - voxels.square[part]);
    Measured measured(first);
    unsigned found = 0;
    for (int64_t i = 0; i < kept; ++i) {
      const int32_t slot = s.kept[i];
      const Members& m = members[slot];
      const unsigned near = near_voxels(m, voxels, limit);
      if (!near) continue;
      found |= near;
      if (!s.framed[slot]) make_group_frames(slot);
      for (int v = 0; v * kF < s.count[slot]; ++v)
        measured.offer(group_frames(slot) + v * kFrames, near, static_cast<Int>(i * kGroup + v * kF));
    }
    for (; found; found &= found - 1) {
      const int l = __builtin_ctz(found);
      Int at;
      const Real d2 = measured.nearest(l, at);
      this->set(first, l, d2, static_cast<uint32_t>(s.kept[at / kGroup] * kGroup + at % kGroup));
    }
    return true;
  }

  // Appends the selected groups of s.brick, from the i-th on, to s.kept. Returns how many.
  int keep(int64_t to, I selected, int64_t i, int64_t count) const {
    const unsigned bits = lane_bits(selected) & lanes_left(count - i);
    store(s.kept + to, Packer(bits)(load<I>(s.brick.id + i)));
    return __builtin_popcount(bits);
  }

  Frame<V>* group_frames(int64_t slot) const {
    return reinterpret_cast<Frame<V>*>(frames + slot * kGroup * kStride<Real>);
  }

  void make_group_frames(int64_t slot) {
    const Members& m = members[slot];
    const uint32_t* face = s.frame_face + slot * kGroup;
    I parts{};
    for (int v = 0; v < kVectors; ++v) parts |= load<F>(m.slack + v * kF) > kOffSurfaceSlack;
    const bool whole = m.shared || !any_lane(parts);
    for (int v = 0; v * kF < s.count[slot]; ++v) {
      const int64_t count = s.count[slot] - v * kF;
      F t[9];
      for (int corner = 0; corner < 3; ++corner) {
        const I at = widen(m.corner[corner] + v * kF);
        for (int k = 0; k < 3; ++k)
          t[3 * corner + k] =
              -0.5f * (m.shared ? look_up32(m.twice[k], at) : load<F>(m.twice[k] + corner * kGroup + v * kF));
      }
      if constexpr (sizeof(Real) == 4)
        if (!whole) load_corners(job.mesh, job.grid, job.centre, face + v * kF, count, t);
      make_frames(job, face + v * kF, count, t, group_frames(slot) + v * kFrames);
    }
    s.framed[slot] = 1;
  }

  // Gives a group a slot and loads it. False when there is none left.
  bool load_members(int32_t i) {
    if ((loaded + 1) * kGroup > job.scratch->frame_capacity) return false;
    const int32_t slot = static_cast<int32_t>(loaded++);
    const SphereRun& run = job.runs[s.run[i]];
    const uint32_t first = s.first[i], *packed = job.spheres.packed + first;
    const int64_t count = run.end - first < kGroup ? run.end - first : kGroup;
    Members& m = members[slot];
    m.shared = SharedVertices::are_at(packed);
    if (m.shared) {
      SharedVertices shared;
      std::memcpy(&shared, packed, sizeof(shared));
      alignas(64) float position[3][SharedVertices::kMost];
      load_shared(job.mesh, job.grid, job.centre, run.vertices + shared.begin, shared.count, position);
      std::memcpy(m.corner, shared.corner, sizeof(m.corner));
      m.points = static_cast<int32_t>(shared.count);
      for (int i = 0; i < m.points; i += kF) {
        const F p[3] = {load<F>(position[0] + i), load<F>(position[1] + i), load<F>(position[2] + i)};
        set_points(m, i, p, shared.slack - F{}, F{});
      }
    } else {
      const Corners group = load_group(job.mesh, job.grid, job.centre, job.spheres, run.corner, first, count);
      m.points = Members::kMost;
      for (int v = 0; v < kVectors; ++v) {
        const F pad = group.pad[v], slack = (circle_square(group.t[v]) + pad * (2 * reach + pad)) * kCircleRoom;
        for (int corner = 0; corner < 3; ++corner)
          set_points(m, corner * kGroup + v * kF, group.t[v] + 3 * corner, slack, pad);
      }
    }
    for (int l = 0; l < count; ++l) s.frame_face[slot * kGroup + l] = job.spheres.face[first + l];
    s.count[slot] = static_cast<int32_t>(count);
    s.framed[slot] = 0;
    s.slot[i] = slot;
    return true;
  }

  // A vector of points from the i-th on; they are off the surface where there is a pad.
  static void set_points(Members& m, int i, const F* p, F slack, F pad) {
    for (int k = 0; k < 3; ++k) store(m.twice[k] + i, -2 * p[k]);
    store(m.square + i, dot(p, p) - slack);
    store(m.slack + i, pad > 0 ? F{} + 1e30f : slack);
  }

  int64_t run() {
    const int64_t n = gather();
    if (n == 0) return 0;
    for (int octant = 0; octant < 8; ++octant) {
      const int low[3] = {(octant >> 2) * 4, (octant >> 1 & 1) * 4, (octant & 1) * 4};
      if (low[0] >= job.size[0] || low[1] >= job.size[1] || low[2] >= job.size[2]) continue;
      const float middle[3] = {low[0] - 2.0f, low[1] - 2.0f, low[2] - 2.0f}, half[3] = {1.5f, 1.5f, 1.5f};
      const int64_t m = cull(s.block, n, middle, half, s.octant);
      if (m == 0) continue;
      for (int x = 0; x < 4; x += 2)
        for (int y = 0; y < 4; y += 2)
          for (int z = 0; z < 4; z += kDeep) {
            const int first[3] = {low[0] + x, low[1] + y, low[2] + z};
            float centre[3];
            this->middle(first, centre);
            const int64_t near = cull(s.octant, m, centre, kHalf, s.brick);
            if (near > 0 && !refine(near, first, centre)) return 2 * job.scratch->frame_capacity;
          }
    }
    if (loaded > 0) this->collect(s.frame_face);
    return 0;
  }
};

}  // namespace
}  // namespace cvc::narrow_band
