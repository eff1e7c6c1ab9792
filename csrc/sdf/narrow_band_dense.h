// One block where triangles are much smaller than a voxel. For isa_narrow_band.cpp alone: everything has internal
// linkage.
//
// Spheres around triangles are poor bounds then: seen from the distance D one of radius r may hide a point nearer by
// r (2D + r) in square, so that hundreds of triangles stay candidates for a voxel. Two sharper bounds cull instead:
//
// - Groups of triangles by the distance to their oriented boxes (narrow_band_group_boxes.h), voxel by voxel.
// - Triangles by their vertices. For a point t = Σ λ_i v_i of the triangle
//     |x - t|² = Σ λ_i |x - v_i|² - Σ_{i<j} λ_i λ_j |v_i - v_j|²  >=  min_i |x - v_i|² - r²,
//   because the last sum is the variance of the weighted vertices, at most the squared radius r² of the smallest circle
//   around them. The slack r² does not grow with the distance.
//
// What they are compared with, the least distance of a voxel to a vertex, is nearly as good as the exact one.
#pragma once

#include "common/simd.h"
#include "sdf/narrow_band.h"
#include "sdf/narrow_band_bricks.h"
#include "sdf/narrow_band_cull.h"
#include "sdf/narrow_band_frames.h"
#include "sdf/narrow_band_group_boxes.h"

namespace cvc::narrow_band {
namespace {

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

constexpr float kCircleRoom = 1 + 1e-5f;   // for rounding
constexpr float kOffSurfaceSlack = 1e29f;  // more than any other

template <class Real, class Index>
struct DenseBlock : Bricks<Real, Index> {
  using Base = Bricks<Real, Index>;
  using Base::band, Base::frames, Base::job, Base::kColumns, Base::kDeep, Base::kHalf;
  using typename Base::Bound, typename Base::Spread;

  const GroupScratch& s = job.scratch->groups;
  float reach = 0;     // at least the distance of any of the block's voxels to the surface
  int64_t loaded = 0;  // groups
  // For rounding of squared distances to corners less |x|²: corners that matter are not farther out than this.
  const float corner_room = 1e-4f + 1.5e-6f * (band + 16) * (band + 16);

  // The triangles of a group. Corners v are kept as -2v (by corner and axis) and |v|² - slack, where the slack is how
  // much nearer than the nearest corner a triangle may be, in square: less |x|², squared distances are linear in the
  // voxel x.
  struct Members {
    F twice[kVectors][9], square[kVectors][3];
    F slack[kVectors];  // large where the corners are none of the triangle's
  };
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
    alignas(64) float most[kColumns];

    void operator()(const Bound& bound, float band, float room) {
      for (int k = 0; k < kColumns; k += kF) {
        const F least = vmin(load<F>(bound.least + k), F{} + band * band);
        store(most + k, least + (room + 4e-6f * least));
      }
    }
    // How far the numbers of the voxels in column l are below their limits, at most; negative where one is.
    template <class Number>
    F column(int l, const Number& number) const {
      F least = number(l, 0) - most[l * kDeep];
      for (int k = 1; k < kDeep; ++k) least = vmin(least, number(l, k) - most[l * kDeep + k]);
      return least;
    }
    // Is a voxel's number below its limit?
    template <class Number>
    I any(const Number& number) const {
      F least = column(0, number);
      for (int l = 1; l < 4; ++l) least = vmin(least, column(l, number));
      return least < 0;
    }
  };

  Spread squares_of_centres(int64_t i, const float* centre) const {
    const Sphere c = sphere(s.brick, i);
    return Base::squares(c.x - centre[0], c.y - centre[1], c.z - centre[2], load<F>(s.brick.field[kOffSurface] + i));
  }
  // Squared distances to a corner of the members, less |x|² and plus what is to be added.
  static Spread squares_of_corners(const Members& m, int v, int corner, const float* x, F plus) {
    const F* twice = m.twice[v] + 3 * corner;
    const F at = m.square[v][corner] + plus + twice[0] * x[0] + twice[1] * x[1] + twice[2] * x[2];
    Spread s{{at, at + twice[1], at + twice[0], at + twice[0] + twice[1]}, {}};
    for (int k = 1; k < kDeep; ++k) s.along[k] = static_cast<float>(k) * twice[2];
    return s;
  }
  // |x|² of the voxels of the brick that begins at x.
  void squares_of_voxels(const float* x, float* out) const {
    for (int l = 0; l < 4; ++l)
      for (int k = 0; k < kDeep; ++k) {
        const float a = x[0] + l / 2, b = x[1] + l % 2, c = x[2] + k;
        out[l * kDeep + k] = a * a + b * b + c * c;
      }
  }

  // The columns, as bits, in which the box of a group of s.brick is near enough to some voxel.
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
    I columns{};
    for (int l = 0; l < 4; ++l)
      columns |= (limit.column(l,
                               [&](int l, int k) {
                                 F d2{};
                                 for (int a = 0; a < 3; ++a) {
                                   const F out = vmax(vabs(along[a](l, k)) - extent[a], F{});
                                   d2 += out * out;
                                 }
                                 return d2;
                               }) < 0) &
                 (1 << l);
    return columns;
  }

  // The slots of `count` groups of s.kept, loaded if need be. False when there is no room.
  bool load_groups(int64_t from, int64_t to) {
    const auto waits = [&](int64_t i) { return i < to && s.slot[s.kept[i]] < 0; };
    const auto faces_of = [&](int64_t i) { return job.spheres.face + s.first[s.kept[i]]; };
    for (int64_t i = from; i < to; ++i) {
      if (waits(i + 2)) prefetch_faces(job.mesh, faces_of(i + 2));
      if (waits(i + 1)) prefetch_vertices(job.mesh, faces_of(i + 1));
      int32_t& slot = s.slot[s.kept[i]];
      if (slot < 0) slot = load_members(s.kept[i]);
      if (slot < 0) return false;
      s.kept[i] = slot;
    }
    return true;
  }

  // The triangles of the groups in s.brick that can be nearest to some voxel: their frames → s.id. Returns how many, or
  // -1 when there is no room.
  int64_t refine(int64_t count, const float* centre) {
    for (int k = 0; k < 3; ++k) store(s.brick.field[kX + k] + count, F{} + 1e10f);  // fills the last vector
    store(s.brick.field[kOffSurface] + count, F{});
    // Groups whose centres are nearest to some voxel: their vertices are the better bound.
    Bound bound;
    for (int64_t i = 0; i < count; i += kF) bound.offer(squares_of_centres(i, centre));
    bound.settle();
    Limit limit;
    for (int k = 0; k < kColumns; ++k) {
      const float least = bound.least[k];
      limit.most[k] = least < (band + 0.5f) * (band + 0.5f) ? least + (1e-4f + 1e-4f * least) : 0;
    }
    int64_t nearest = 0;
    for (int64_t i = 0; i < count; i += kF)
      nearest += keep(nearest, limit.any(squares_of_centres(i, centre)), i, count);
    if (!load_groups(0, nearest)) return -1;
    const float x[3] = {centre[0] - kHalf[0], centre[1] - kHalf[1], centre[2] - kHalf[2]};
    alignas(64) float square[kColumns];
    squares_of_voxels(x, square);
    for (int k = 0; k < kColumns; ++k) bound.square[k] = bound.least[k] - square[k] - F{};
    for (int64_t i = 0; i < nearest; ++i)  // one corner of a triangle: the others are its neighbours' too
      for (int v = 0; v < kVectors; ++v) {
        const Members& m = members[s.kept[i]];
        bound.offer(squares_of_corners(m, v, 0, x, m.slack[v]));
      }
    bound.settle(square);
    limit(bound, band, corner_room);

    int64_t kept = 0;
    for (int64_t i = 0; i < count; i += kF) kept += keep(kept, near_enough(i, centre, limit), i, count);
    if (!load_groups(0, kept)) return -1;
    for (int k = 0; k < kColumns; ++k) limit.most[k] -= square[k];
    int64_t n = 0;
    for (int64_t i = 0; i < kept; ++i) {
      const int32_t slot = s.kept[i];
      const Members& m = members[slot];
      bool some = false;
      for (int v = 0; v * kF < s.count[slot]; ++v) {
        const Spread a = squares_of_corners(m, v, 0, x, F{}), b = squares_of_corners(m, v, 1, x, F{}),
                     c = squares_of_corners(m, v, 2, x, F{});
        F least = F{} + 1e30f;
        for (int l = 0; l < 4; ++l)
          if (s.columns[i] >> l & 1)
            least = vmin(least, limit.column(l, [&](int l, int k) { return vmin(vmin(a(l, k), b(l, k)), c(l, k)); }));
        const unsigned bits = lane_bits(least < 0) & lanes_left(s.count[slot] - v * kF);
        if (!bits) continue;
        some = true;
        store(s.id + n, Packer(bits)(load<I>(kLaneIndex) + (slot * kGroup + v * kF)));
        n += __builtin_popcount(bits);
      }
      if (some && !s.framed[slot]) make_group_frames(slot);
    }
    return n;
  }

  // Appends the selected groups of s.brick, from the i-th on, to s.kept. Returns how many.
  int keep(int64_t to, I columns, int64_t i, int64_t count) const {
    const unsigned bits = lane_bits(columns != 0) & lanes_left(count - i);
    const Packer packer(bits);
    store(s.kept + to, packer(load<I>(s.brick.id + i)));
    store(s.columns + to, packer(columns));
    return __builtin_popcount(bits);
  }

  void make_group_frames(int64_t slot) {
    const Members& m = members[slot];
    const uint32_t* face = s.frame_face + slot * kGroup;
    Real* const out = frames + slot * kGroup * kStride<Real>;
    I parts{};
    for (int v = 0; v < kVectors; ++v) parts |= m.slack[v] > kOffSurfaceSlack;
    if (any_lane(parts)) {
      make_frames(job, face, s.count[slot], out);
    } else {
      for (int v = 0; v < kVectors; ++v) {
        F t[9];
        for (int k = 0; k < 9; ++k) t[k] = -0.5f * m.twice[v][k];
        make_frames(job, face + v * kF, s.count[slot] - v * kF, t, out + v * kF * kStride<Real>);
      }
    }
    s.framed[slot] = 1;
  }

  // Its slot, or -1 when there is none left.
  int32_t load_members(int32_t i) {
    if ((loaded + 1) * kGroup > job.scratch->frame_capacity) return -1;
    const int32_t slot = static_cast<int32_t>(loaded++);
    const SphereRun& run = job.runs[s.run[i]];
    const uint32_t first = s.first[i];
    const int64_t count = run.end - first < kGroup ? run.end - first : kGroup;
    const Corners group = load_group(job.mesh, job.grid, job.centre, job.spheres, run.corner, first, count);
    Members& m = members[slot];
    for (int v = 0; v < kVectors; ++v) {
      const F* t = group.t[v];
      const F pad = group.pad[v], slack = (circle_square(t) + pad * (2 * reach + pad)) * kCircleRoom;
      for (int k = 0; k < 9; ++k) m.twice[v][k] = -2 * t[k];
      for (int corner = 0; corner < 3; ++corner) {
        const F* p = t + 3 * corner;
        m.square[v][corner] = p[0] * p[0] + p[1] * p[1] + p[2] * p[2] - slack;
      }
      m.slack[v] = pad > 0 ? F{} + 1e30f : slack;
    }
    for (int l = 0; l < count; ++l) s.frame_face[slot * kGroup + l] = job.spheres.face[first + l];
    s.count[slot] = static_cast<int32_t>(count);
    s.framed[slot] = 0;
    return slot;
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
            if (near == 0) continue;
            const int64_t count = refine(near, centre);
            if (count < 0) return 2 * job.scratch->frame_capacity;
            if (count > 0) this->measure(first, reinterpret_cast<const uint32_t*>(s.id), count);
          }
    }
    if (loaded > 0) this->collect(s.frame_face);
    return 0;
  }
};

}  // namespace
}  // namespace cvc::narrow_band
