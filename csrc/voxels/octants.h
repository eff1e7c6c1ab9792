// Voxels in order whose parents have at most two children along every axis, slab by slab: stretches of rows whose
// parents have one x. A parent is a byte that tells which of its children are there, in the order of their rows: from
// these bytes alone follows which rows go to which parent. Kernels per instruction set; see isa_octants.cpp.
#pragma once

#include <cstdint>

namespace cvc::voxels {

// The parents that a slab may have: bytes of lines along z, of which `width`, a multiple of 64, are one line.
struct OctantMap {
  uint8_t* children;  // [lines, width], zeros between slabs
  int64_t lines, width;
  int32_t y, z;            // the first parent's
  int32_t half_y, half_z;  // whether parents have two children along y, z; else one
};

struct OctantLine {
  int32_t y;  // of parents
  uint32_t count;
};

// Parents of a slab, line after line.
struct OctantSlab {
  int64_t begin, end;  // rows
  int64_t planes[2];   // the first row whose x is even, odd among its parent's children
  int32_t batch, x;    // of parents
  int64_t lines;       // those with parents
  int64_t parents;
};

// What the features of parents are made of.
struct OctantFeatures {
  const void* rows;  // [, channels], float or double
  void* out;         // [, channels]
  int64_t channels;  // 0: no features
  bool is_double, is_max, is_mean;
  bool from_zero;  // whether a row of zeros takes part
  bool large;      // the result is: no cache keeps it until it is read
};

struct OctantOutputs {
  int32_t* coords;
  int64_t *inverse, *counts;
  OctantFeatures features;
};

struct OctantKernels {
  // Marks the parents of the rows [begin, end) of one plane as having these children; `child`: of x.
  void (*mark)(const OctantMap& map, const int32_t* coords, int64_t begin, int64_t end, int child);
  // Lists the parents of all lines and clears the map. There must be room for 64 more z and bytes than parents, and for
  // as many lines as the map has.
  void (*list)(const OctantMap& map, OctantSlab* slab, OctantLine* lines, uint16_t* z, uint8_t* children);
  // Writes the parents of a slab, of which the first is the row `first` of the outputs. Scratch: a number for every
  // row.
  void (*write)(const OctantSlab& slab, const OctantLine* lines, const uint16_t* z, const uint8_t* children,
                int64_t first, const OctantOutputs& out, uint32_t* scratch);
};

const OctantKernels* octant_kernels_baseline();
const OctantKernels* octant_kernels_avx2();
const OctantKernels* octant_kernels_avx512();

}  // namespace cvc::voxels
