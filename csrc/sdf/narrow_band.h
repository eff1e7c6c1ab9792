// The narrow band of a triangle soup on the CPU: every voxel whose centre is nearer than `band` to a triangle, with the
// exact distance and a nearest face. (CUDA: narrow_band_pipeline.h.)
//
//   narrow_band_sphere.h   the smallest sphere around a triangle, names of cells; shared with CUDA
//   narrow_band_bins.cpp   triangles → bounding spheres (narrow_band_spheres.h), sorted into cells of 8³ voxels
//   narrow_band_groups.cpp where triangles are many: groups of neighbours, bounded by oriented boxes
//                          (narrow_band_group_boxes.h), and what vertices each shares (narrow_band_corners.h)
//   isa_narrow_band.cpp    one block of 8³ voxels: spheres culled (narrow_band_cull.h), or groups and then triangles by
//                          their vertices (narrow_band_dense.h); exact distances (narrow_band_bricks.h) in the
//                          triangles' own frames (narrow_band_frames.h)
//   narrow_band_rows.cpp   runs the blocks in parallel and writes the voxels in lexicographic order
//   narrow_band_cpu.cpp    the operator
//
// All lengths in here are in voxels. Sphere bounds carry the slack of their own rounding, so that culling in float32
// never loses a triangle; distances are computed relative to the block's centre, in the precision of the vertices.
#pragma once

#include <cstdint>

namespace cvc::narrow_band {

constexpr int kBlock = 8;  // voxels per block and per cell, along each axis
constexpr int kBlockVoxels = kBlock * kBlock * kBlock;
constexpr int kBlockRows = kBlock * kBlock;      // (x, y) pairs
constexpr int64_t kFarthest = int64_t{1} << 31;  // |grid coordinate| allowed to a vertex

// Reported to Python as its number.
enum class Status : int64_t { ok, index_out_of_range, not_finite, too_far, bad_batch, too_large };

// Triangle soup in world units.
template <class Real, class Index>
struct Mesh {
  const Real* vertices;  // [vertex_count, 3]
  const Index* faces;    // [face_count, 3]
  int64_t vertex_count, face_count;
};

template <class Real>
struct Output {
  int32_t* coords;  // [N, 4]
  Real* distance;   // [N], world units
  int64_t* face;    // [N]
};

struct Grid {
  double low[3];    // world position of the grid's corner
  double voxels;    // per world unit, 1 / h
  int32_t size[3];  // voxels along each axis
  double band;      // half-width in voxels
};

// A bounding sphere of (a part of) a triangle, relative to its cell, in 4 bytes: three coordinates in 1/32 voxel (the
// centre of the step) and a radius in kRadiusStep, rounded up far enough to cover the rounding of the centre.
constexpr float kCentreStep = 1.0f / 32;
constexpr float kCentreError = 0.8660254f * kCentreStep + 1e-5f;  // half a step's diagonal, and rounding
constexpr float kLargestRadius = 4.5f;                            // longer triangles are cut into parts
constexpr float kRadiusStep = kLargestRadius / 254;

// A run of spheres that share a cell, the first of its groups, and where the cell's corner lies relative to the block's
// centre.
struct SphereRun {
  uint32_t begin, end, group;
  float corner[3];
  const uint32_t* vertices;  // of its groups
};

struct Spheres {
  const uint32_t* packed;  // [n + 16]
  const uint32_t* face;    // [n + 16]
};

// Spheres of consecutive faces, relative to their cells.
struct FaceSpheres {
  static constexpr int kFaces = 256;
  // A face has no sphere (it is out of reach), one, or is unusual: long, far away, or wrong.
  enum Kind : int32_t { kNone, kOne, kUnusual };
  uint32_t packed[kFaces];
  int32_t cell[3][kFaces];
  int32_t kind[kFaces];
};

template <class Real, class Index>
struct SphereJob {
  Mesh<Real, Index> mesh;
  Grid grid;
  double largest_radius;
  int64_t first, count;  // faces, at most FaceSpheres::kFaces
  FaceSpheres* out;
};

// Where triangles are many, kGroup spheres that follow each other in their cell are a group, bounded by an oriented
// box: its centre (relative to the cell's corner), two of its axes, the extent along either and across both, and its
// reach from the centre. Centres are on the surface up to kCentreError; exactly where "off surface" is not large.
constexpr int kGroup = 16;
enum GroupField { kX = 0, kReach = 3, kU = 4, kW = 7, kExtent = 10, kOffSurface = 13, kGroupFields = 14 };
struct GroupList {
  float* field[kGroupFields];  // [groups + 16] each; null: there are no groups
  int32_t* id;
};

// The vertices of a group, where its triangles are whole and share enough of them: each is read once then, instead of
// once for every triangle. It lies where the group's spheres were, which nobody needs any more, and is told from them
// by its first number: no sphere's radius is 0.
struct SharedVertices {
  static constexpr int kMost = 32;
  uint32_t count, begin;      // of the vertices of the cell's groups
  uint8_t corner[3][kGroup];  // of each triangle: which of them they are
  float slack;                // the most of the triangles' (narrow_band_dense.h)

  static bool are_at(const uint32_t* packed) { return *packed <= kMost; }
};
static_assert(sizeof(SharedVertices) <= kGroup * sizeof(uint32_t));

template <class Real, class Index>
struct GroupJob {
  Mesh<Real, Index> mesh;
  Grid grid;
  Spheres spheres;
  uint32_t* packed;     // those of `spheres`
  double corner[3];     // of the cell, in voxels from the grid's corner
  uint32_t begin, end;  // the cell's spheres
  uint32_t group;       // the first of its groups
  GroupList out;
  uint32_t* vertices;  // room for SharedVertices::kMost of each of its groups
};

struct SphereList {
  float *x, *y, *z, *r;
  uint32_t* id;
};

// Working memory of one thread for groups: lists of `capacity` + 16 elements; and by slot, as groups get one when their
// triangles are needed, room for as many as frames allow.
struct GroupScratch {
  GroupList block, octant, brick;  // groups that matter; ids: places in `block`
  uint32_t* first;                 // of the block's groups: their first spheres,
  int32_t* run;                    // runs,
  int32_t* slot;                   // and slots, or -1
  int32_t* kept;                   // groups that are left for a brick: places in `block`, then slots
  int32_t* waiting;                // those of them that have no slot yet
  int32_t *count, *framed;         // triangles in a slot; are their frames made?
  void* members;
  uint32_t* frame_face;
  int64_t capacity;
};
constexpr int64_t kMemberBytes = 16 * kGroup * sizeof(float);

// Working memory of one thread: arrays of `capacity` + 16 elements, and room for `frame_capacity` frames.
struct Scratch {
  SphereList block;      // ids: places in Spheres
  SphereList octant;     // ids: places in `block`, then frames
  int32_t* frame_of;     // of the block's spheres, -1 when no octant has needed it yet
  uint32_t* brick;       // frames
  uint32_t* frame_face;  // the face that a frame is of
  void* frames;
  int64_t capacity, frame_capacity;
  GroupScratch groups;
};

template <class Real>
struct BlockVoxels {
  uint8_t mask[kBlockRows];          // bit z of row 8x + y: voxel (x, y, z) is in the band
  Real distance[kBlockVoxels + 16];  // of the voxels in the band, in the order of the mask; in voxels
  uint32_t face[kBlockVoxels + 16];
  int32_t count;
};

template <class Real, class Index>
struct Job {
  Mesh<Real, Index> mesh;
  Grid grid;
  Spheres spheres;
  GroupList groups;
  const SphereRun* runs;
  int64_t run_count;
  double centre[3];  // of the block, in voxels from the grid's corner
  int32_t size[3];   // voxels of the block that are in the grid, 1..8 along each axis
  Scratch* scratch;
  BlockVoxels<Real>* out;
};

// Measures the spheres of some faces.
template <class Real, class Index>
using SphereKernel = void (*)(const SphereJob<Real, Index>&);
// Measures one block. Returns 0, or the number of frames the scratch should have had room for.
template <class Real, class Index>
using BlockKernel = int64_t (*)(const Job<Real, Index>&);
// Measures the boxes of the groups of a cell, and finds what vertices they share. Returns how many those are.
template <class Real, class Index>
using GroupKernel = uint32_t (*)(const GroupJob<Real, Index>&);

template <class Real, class Index>
struct KernelsFor {
  SphereKernel<Real, Index> spheres;
  BlockKernel<Real, Index> block;
  GroupKernel<Real, Index> groups;
  int64_t frame_bytes;
};

struct Kernels {
  KernelsFor<float, int32_t> float_int32;
  KernelsFor<float, int64_t> float_int64;
  KernelsFor<double, int32_t> double_int32;
  KernelsFor<double, int64_t> double_int64;
};
Kernels narrow_band_kernels_baseline();
Kernels narrow_band_kernels_avx2();
Kernels narrow_band_kernels_avx512();

}  // namespace cvc::narrow_band
