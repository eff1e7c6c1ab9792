// One block of 8³ voxels as bricks, one vector of voxels each, with exact distances. For isa_narrow_band.cpp alone:
// everything has internal linkage.
//
// Triangles are measured without branches in their own frames: height over the plane, and in the plane the least
// squared distance to the three edges, or 0 inside. Frames are relative to the block's centre: every coordinate that
// matters is small, however large the triangle is.
#pragma once

#include "common/simd.h"
#include "sdf/narrow_band.h"
#include "sdf/narrow_band_frames.h"

namespace cvc::narrow_band {
namespace {

template <class Real, class Index, int lanes>
struct Bricks {
  // A brick is two voxels wide along x and y; its lanes run along z first. Culling is in float32 for every Real.
  static constexpr int kLanes = lanes;
  static constexpr int kParts = kLanes / kWidth<Real>;
  static constexpr int kDeep = kLanes / 4;
  static constexpr int kFrames = kF / kWidth<Real>;  // of kF triangles, as many in each as a vector has lanes
  static constexpr Real kNone = Real(1e30);
  struct Offset {
    float of[3][kLanes];  // a brick's voxels from its first
    constexpr Offset() : of{} {
      for (int l = 0; l < kLanes; ++l) of[0][l] = l / (2 * kDeep), of[1][l] = l / kDeep % 2, of[2][l] = l % kDeep;
    }
  };
  static constexpr Offset kOffset{};
  using Int = typename IntegerLike<Real>::type;
  using V = Vec<Real>;
  using M = Vec<Int>;

  const Job<Real, Index>& job;
  Real* const frames;
  const float band;
  V lane[3][kParts];               // a brick's voxels relative to its first
  Real squared[kBlockVoxels];      // distance²
  uint32_t nearest[kBlockVoxels];  // frame

  explicit Bricks(const Job<Real, Index>& j)
      : job(j),
        frames(static_cast<Real*>(j.scratch->frames)),
        band(static_cast<float>(j.grid.band) * (1 + 1e-6f) + 1e-5f) {
    for (int axis = 0; axis < 3; ++axis)
      for (int l = 0; l < kLanes; ++l) lane[axis][l / kWidth<Real>][l % kWidth<Real>] = kOffset.of[axis][l];
    for (Real& d2 : squared) d2 = kNone;
  }

  // Middle and half extents of the brick whose first voxel is `first`, relative to the block's centre.
  static constexpr float kHalf[3] = {0.5f, 0.5f, 0.5f * kDeep - 0.5f};
  static void middle(const int* first, float* centre) {
    for (int k = 0; k < 3; ++k) centre[k] = first[k] - 3.5f + kHalf[k];
  }

  // A function of a brick's voxels that is a sum of one of (x, y) and one of z: in voxel l·kDeep + k, column[l] +
  // along[k].
  struct Spread {
    F column[4], along[kDeep];
    F operator()(int l, int k) const { return column[l] + along[k]; }
  };
  // The linear function with this value in the middle of the brick and this gradient.
  static Spread linear(F value, F x, F y, F z) {
    const F sum = 0.5f * (x + y), difference = 0.5f * (x - y);
    Spread s{{value - sum, value - difference, value + difference, value + sum}, {}};
    for (int k = 0; k < kDeep; ++k) s.along[k] = (k - kHalf[2]) * z;
    return s;
  }
  // Squared distances to points, relative to the middle of the brick, plus what is to be added.
  static Spread squares(F x, F y, F z, F plus) {
    Spread s = linear(x * x + y * y + z * z + (plus + 0.5f), -2 * x, -2 * y, -2 * z);
    for (int k = 0; k < kDeep; ++k) s.along[k] += (k - kHalf[2]) * (k - kHalf[2]);
    return s;
  }

  // What is known of each voxel's distance, from points of the surface.
  struct Bound {
    F square[kLanes];  // per lane of what was offered
    float least[kLanes];

    Bound() {
      for (F& v : square) v = F{} + 1e30f;
    }
    void offer(const Spread& points) {
      for (int l = 0; l < 4; ++l)
        for (int k = 0; k < kDeep; ++k) square[l * kDeep + k] = vmin(square[l * kDeep + k], points(l, k));
    }
    // Of all lanes; what was offered is forgotten.
    void settle() {
      for (int k = 0; k < kLanes; k += kF) {
        transpose(square + k);
        F v = square[k];
        for (int l = 1; l < kF; ++l) v = vmin(v, square[k + l]);
        store(least + k, vmax(v, F{}));
      }
    }
  };

  // Exact squared distances of points to triangles, by lane; Number: Real if all lanes have one triangle, else V.
  template <class Number>
  static V square_distance(const Frame<Number>& f, V x, V y, V z) {
    const V u = f.e1[0] * x + f.e1[1] * y + f.e1[2] * z;
    const V v = f.e2[0] * x + f.e2[1] * y + f.e2[2] * z;
    const V w = f.n[0] * x + f.n[1] * y + (f.n[2] * z - f.height);
    const auto beyond = [](V s, Number low, Number high) {
      const V l = low - V{}, h = high - V{};
      const V raised = s < l ? l : s;
      return s - (raised < h ? raised : h);
    };
    // Signed distance to each edge's line, positive outside.
    const V out_ab = f.ab_v - v;
    const V out_bc = u * f.bc.v - (v * f.bc.u + f.bc.offset);
    const V out_ca = u * f.ca.v - (v * f.ca.u + f.ca.offset);
    const V past_ab = beyond(u, f.ab_low, f.ab_high);
    const V past_bc = beyond(u * f.bc.u + v * f.bc.v, f.bc.low, f.bc.high);
    const V past_ca = beyond(u * f.ca.u + v * f.ca.v, f.ca.low, f.ca.high);
    const V d_bc = out_bc * out_bc + past_bc * past_bc;
    const V d_ca = out_ca * out_ca + past_ca * past_ca;
    // Inside all three lines only the stretch past a or b counts, which is 0 in the triangle. (For a needle the lines
    // nearly coincide and rounding decides "inside"; this keeps the point beyond its tip outside.)
    V outermost = out_ab < out_bc ? out_bc : out_ab;
    outermost = outermost < out_ca ? out_ca : outermost;
    const V across = out_ab * out_ab;
    const V d_ab = past_ab * past_ab + (outermost < 0 ? V{} : across);
    V plane = d_ab < d_bc ? d_ab : d_bc;
    plane = plane < d_ca ? plane : d_ca;
    return w * w + plane;
  }

  // Exact squared distances of a brick's voxels to the triangles with `count` frames.
  void distances(const uint32_t* id, int64_t count, const int* first, Real* d2, Int* index) const {
    V x[kParts], y[kParts], z[kParts], best[kParts];
    M nearest[kParts];
    for (int k = 0; k < kParts; ++k) {
      x[k] = lane[0][k] + static_cast<Real>(first[0] - 3.5);
      y[k] = lane[1][k] + static_cast<Real>(first[1] - 3.5);
      z[k] = lane[2][k] + static_cast<Real>(first[2] - 3.5);
      best[k] = V{} + kNone;
      nearest[k] = M{};
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t frame = id[i];
      const Frame<Real>& f = frame_at(frames, frame);
      for (int k = 0; k < kParts; ++k) {
        const V d = square_distance(f, x[k], y[k], z[k]);
        const M closer = d < best[k];
        best[k] = closer ? d : best[k];
        nearest[k] = closer ? M{} + static_cast<Int>(frame) : nearest[k];
      }
    }
    for (int k = 0; k < kParts; ++k) {
      store(d2 + k * kWidth<Real>, best[k]);
      store(index + k * kWidth<Real>, nearest[k]);
    }
  }

  // The nearest triangles of a brick's voxels, as vectors of triangles are measured, each for the voxels that it may
  // matter to. Of triangles that are equally near the first one offered stays.
  struct Measured {
    Real position[3][kLanes];
    V best[kLanes][kFrames];
    M index[kLanes][kFrames];

    explicit Measured(const int* first) {
      for (int axis = 0; axis < 3; ++axis)
        for (int l = 0; l < kLanes; ++l)
          position[axis][l] = static_cast<Real>(kOffset.of[axis][l] + (first[axis] - 3.5));
      for (auto& voxel : best)
        for (V& d2 : voxel) d2 = V{} + kNone;
    }

    // kF triangles, whose numbers are first, first + 1, ..., and the voxels they may matter to, as bits. Numbers ascend
    // from call to call.
    void offer(const Frame<V>* frame, unsigned voxels, Int first) {
      M order{};
      for (int k = 0; k < kWidth<Real>; ++k) order[k] = first + k;
      for (; voxels; voxels &= voxels - 1) {
        const int l = __builtin_ctz(voxels);
        const V x = position[0][l] - V{}, y = position[1][l] - V{}, z = position[2][l] - V{};
        for (int k = 0; k < kFrames; ++k) {
          const V d2 = square_distance(frame[k], x, y, z);
          const M closer = d2 < best[l][k];
          best[l][k] = closer ? d2 : best[l][k];
          index[l][k] = closer ? order + static_cast<Int>(k * kWidth<Real>) : index[l][k];
        }
      }
    }

    // The least squared distance of voxel l; the number of its triangle → at.
    Real nearest(int l, Int& at) const {
      const Real* const d2 = reinterpret_cast<const Real*>(best[l]);
      const Int* const number = reinterpret_cast<const Int*>(index[l]);
      int to = 0;
      if constexpr (sizeof(Real) == 4) {
        const F least = -greatest(-best[l][0]) - F{};
        unsigned bits = lane_bits(best[l][0] == least);
        to = __builtin_ctz(bits);
        for (bits &= bits - 1; bits; bits &= bits - 1)
          if (number[__builtin_ctz(bits)] < number[to]) to = __builtin_ctz(bits);
      } else {
        for (int k = 1; k < kF; ++k)
          if (d2[k] < d2[to] || (d2[k] == d2[to] && number[k] < number[to])) to = k;
      }
      at = number[to];
      return d2[to];
    }
  };

  // Measures a brick's voxels against the triangles with `count` frames.
  void measure(const int* first, const uint32_t* id, int64_t count) {
    Real d2[kLanes];
    Int index[kLanes];
    distances(id, count, first, d2, index);
    for (int l = 0; l < kLanes; ++l) set(first, l, d2[l], static_cast<uint32_t>(index[l]));
  }

  // The nearest triangle of voxel l of a brick.
  void set(const int* first, int l, Real d2, uint32_t frame) {
    const int to = ((first[0] + l / (2 * kDeep)) * kBlock + first[1] + l / kDeep % 2) * kBlock + first[2] + l % kDeep;
    squared[to] = d2;
    nearest[to] = frame;
  }

  // The voxels in the grid and in the band, in order → job.out. `face`: those that the frames are of.
  void collect(const uint32_t* face) {
    BlockVoxels<Real>& out = *job.out;
    if (job.size[0] < kBlock || job.size[1] < kBlock || job.size[2] < kBlock)
      for (int i = 0; i < kBlockVoxels; ++i)
        if (i / kBlockRows >= job.size[0] || i / kBlock % kBlock >= job.size[1] || i % kBlock >= job.size[2])
          squared[i] = kNone;
    const Real limit = static_cast<Real>(job.grid.band * job.grid.band);
    int count = 0;
    if constexpr (sizeof(Real) == 4) {
      for (int i = 0; i < kBlockVoxels; i += kF) {
        const F d2 = load<F>(squared + i);
        const unsigned bits = lane_bits(d2 < static_cast<float>(limit));
        set_mask(out.mask, i, bits);
        if (!bits) continue;
        const Packer packer(bits);
        store(out.distance + count, pack(packer, root(d2)));
        store(reinterpret_cast<int32_t*>(out.face) + count,
              packer(load<I>(reinterpret_cast<const int32_t*>(nearest) + i)));
        count += __builtin_popcount(bits);
      }
    } else {
      for (int row = 0; row < kBlockRows; ++row) {
        out.mask[row] = 0;
        for (int z = 0; z < kBlock; ++z) {
          const Real d2 = squared[row * kBlock + z];
          if (!(d2 < limit)) continue;
          out.mask[row] |= static_cast<uint8_t>(1 << z);
          out.distance[count] = root(d2);
          out.face[count++] = nearest[row * kBlock + z];
        }
      }
    }
    for (int i = 0; i < count; ++i) out.face[i] = face[out.face[i]];
    out.count = count;
  }

  // kF bits of the mask from voxel i on.
  static void set_mask(uint8_t* mask, int i, unsigned bits) {
    if constexpr (kF < kBlock) {
      mask[i / kBlock] = static_cast<uint8_t>(i % kBlock ? mask[i / kBlock] | bits << (i % kBlock) : bits);
    } else {
      for (int k = 0; k < kF / kBlock; ++k) mask[i / kBlock + k] = static_cast<uint8_t>(bits >> (k * kBlock));
    }
  }
};

}  // namespace
}  // namespace cvc::narrow_band
