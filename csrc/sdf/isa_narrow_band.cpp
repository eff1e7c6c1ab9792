// Distances of one block of 8³ voxels to the triangles around it.
//
// Culling. Let p be a point of the surface, x a voxel centre of a box (centre b, half extents e), and (c, r) a sphere
// around a triangle. The triangle can be left out of the box when |x - c| - r >= |x - p| for all x, and that holds if
//   |b - c|² - |b - p|² - 2 Σ e_i |c_i - p_i|  >=  r (2 U + r),    U = max |x - p| over the box,
// because |x - c|² - |x - p|² is linear in x: far sharper than comparing bounds at the centre. It also can when its
// sphere is farther than the band from the box. Both are applied at 8³, 4³ and 2³ voxels (2×2×4 with 16 lanes). Spheres
// are centred on their triangles, so p is the nearest of their centres. Where triangles are much smaller than a voxel
// the slack r (2 U + r) lets too many through: narrow_band_dense.h has other bounds.
//
// What is left is measured (narrow_band_bricks.h).
#include "common/isa.h"
#include "common/simd.h"
#include "sdf/narrow_band.h"
#include "sdf/narrow_band_bricks.h"
#include "sdf/narrow_band_cull.h"
#include "sdf/narrow_band_dense.h"
#include "sdf/narrow_band_frames.h"
#include "sdf/narrow_band_group_boxes.h"
#include "sdf/narrow_band_spheres.h"

namespace cvc::narrow_band {
namespace {

template <class Real, class Index>
    struct Block : Bricks < Real,
    Index, kF<8 ? 8 : kF> {
  using Base = Bricks < Real, Index, kF<8 ? 8 : kF>;
  using Base::band, Base::frames, Base::job, Base::kDeep, Base::kHalf;

  const Scratch& s = *job.scratch;

  using Base::Base;

  // Any point of the surface will do as p: in a long list the nearest of every fourth vector is near enough.
  static int64_t stride(int64_t n) { return n < 256 ? kF : 4 * kF; }

  // Spheres around the block that matter to it → s.block. Returns how many.
  int64_t gather() {
    Nearest closest;
    for (int64_t k = 0; k < job.run_count; ++k) {
      const SphereRun& run = job.runs[k];
      for (int64_t i = run.begin, step = stride(run.end - run.begin); i < run.end; i += step) {
        const Sphere c = unpack(job.spheres.packed + i, run.corner);
        const F d2 = c.x * c.x + c.y * c.y + c.z * c.z;
        closest.offer(load<I>(kLaneIndex) < static_cast<int32_t>(run.end - i) ? d2 : F{} + 1e30f, c.x, c.y, c.z);
      }
    }
    const float centre[3] = {0, 0, 0}, half[3] = {3.5f, 3.5f, 3.5f};
    float point[3];
    closest.centre(point);
    const Box box(centre, half, point, band);
    int64_t n = 0;
    for (int64_t k = 0; k < job.run_count; ++k) {
      const SphereRun& run = job.runs[k];
      for (uint32_t i = run.begin; i < run.end; i += kF) {
        const Sphere c = unpack(job.spheres.packed + i, run.corner);
        const unsigned bits = lane_bits(box.matters<true>(c)) & lanes_left(run.end - i);
        if (bits) n = append(s.block, n, bits, c, load<I>(kLaneIndex) + static_cast<int32_t>(i));
      }
    }
    return n;
  }

  // The centre of the sphere of a list that is nearest to a point.
  static void nearest_centre(const SphereList& list, int64_t n, const float* to, float* out) {
    Nearest closest;
    for (int64_t i = 0, step = stride(n); i < n; i += step) {
      const Sphere c = at(list, i);
      const F dx = c.x - to[0], dy = c.y - to[1], dz = c.z - to[2];
      const F d2 = dx * dx + dy * dy + dz * dz;
      closest.offer(load<I>(kLaneIndex) < static_cast<int32_t>(n - i) ? d2 : F{} + 1e30f, c.x, c.y, c.z);
    }
    closest.centre(out);
  }

  // The block's spheres that matter to an octant → s.octant, their ids being those of their frames.
  int64_t cull_octant(int64_t n, const float* centre) {
    float point[3];
    nearest_centre(s.block, n, centre, point);
    const float half[3] = {1.5f, 1.5f, 1.5f};
    const Box box(centre, half, point, band);
    int64_t m = 0;
    for (int64_t i = 0; i < n; i += kF) {
      const Sphere c = at(s.block, i);
      const unsigned bits = lane_bits(box.matters<true>(c)) & lanes_left(n - i);
      if (bits) m = append(s.octant, m, bits, c, load<I>(kLaneIndex) + static_cast<int32_t>(i));
    }
    return m;
  }

  // The octant's spheres that matter to a brick: their frames → s.brick.
  template <bool with_band>
  int64_t cull_brick(int64_t m, const Box& box) {
    int32_t* const frame = reinterpret_cast<int32_t*>(s.brick);
    int64_t count = 0;
    for (int64_t i = 0; i < m; i += kF) {
      const unsigned bits = lane_bits(box.matters<with_band>(at(s.octant, i))) & lanes_left(m - i);
      store(frame + count, Packer(bits)(load<I>(reinterpret_cast<int32_t*>(s.octant.id) + i)));
      count += __builtin_popcount(bits);
    }
    return count;
  }

  // Measures the brick whose first voxel is `first` against the m spheres of its octant.
  void brick(const int* first, int64_t m) {
    float centre[3], point[3];
    this->middle(first, centre);
    nearest_centre(s.octant, m, centre, point);
    const Box box(centre, kHalf, point, band);
    const int64_t count = box.inside_band() ? cull_brick<false>(m, box) : cull_brick<true>(m, box);
    if (count > 0) this->measure(first, s.brick, count);
  }

  int64_t run() {
    const int64_t n = gather();
    for (int64_t i = 0; i < n; ++i) s.frame_of[i] = -1;
    int64_t made = 0;
    for (int octant = 0; octant < 8; ++octant) {
      const int low[3] = {(octant >> 2) * 4, (octant >> 1 & 1) * 4, (octant & 1) * 4};
      if (low[0] >= job.size[0] || low[1] >= job.size[1] || low[2] >= job.size[2]) continue;
      const float centre[3] = {low[0] - 2.0f, low[1] - 2.0f, low[2] - 2.0f};
      const int64_t m = cull_octant(n, centre);
      const int64_t had = made;
      for (int64_t i = 0; i < m; ++i) {
        int32_t& frame = s.frame_of[s.octant.id[i]];
        if (frame < 0) {
          frame = static_cast<int32_t>(made);
          s.frame_face[made++] = job.spheres.face[s.block.id[s.octant.id[i]]];
        }
        s.octant.id[i] = static_cast<uint32_t>(frame);
      }
      if (made > s.frame_capacity) return n;
      make_frames(job, s.frame_face + had, made - had, frames + had * kStride<Real>);
      if (m == 0) continue;
      for (int x = 0; x < 4; x += 2)
        for (int y = 0; y < 4; y += 2)
          for (int z = 0; z < 4; z += kDeep) {
            const int first[3] = {low[0] + x, low[1] + y, low[2] + z};
            brick(first, m);
          }
    }
    if (made > 0) this->collect(s.frame_face);
    return 0;
  }
};

template <class Real, class Index>
int64_t block(const Job<Real, Index>& job) {
  job.out->count = 0;
  return job.groups.field[0] ? DenseBlock<Real, Index>(job).run() : Block<Real, Index>(job).run();
}

template <class Real, class Index>
KernelsFor<Real, Index> kernels() {
  return {measure_spheres<Real, Index>, block<Real, Index>, measure_groups<Real, Index>,
          kStride<Real> * static_cast<int64_t>(sizeof(Real))};
}

}  // namespace

Kernels CVC_ISA_NAME(narrow_band_kernels)() {
  return {kernels<float, int32_t>(), kernels<float, int64_t>(), kernels<double, int32_t>(), kernels<double, int64_t>()};
}

}  // namespace cvc::narrow_band
