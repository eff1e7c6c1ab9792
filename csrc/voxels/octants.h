// Voxels in order whose parents have at most two children along every axis, slab by slab: stretches of rows whose
// parents have one x. A parent is a byte that tells which of its children are there, in the order of their rows: from
// these bytes alone follows which rows go to which parent. Kernels per instruction set; see isa_octants.cpp and
// isa_write_octants.cpp.
#pragma once

#include <cstdint>

namespace cvc::voxels {

// The parents of a slab, as bytes [lines, width], both powers of two: that of a parent is at (y mod lines, z mod
// width), so nothing need be known of a slab before its rows are marked. Zeros between slabs.
struct OctantMap {
  uint8_t* children;
  int64_t lines, width;  // at least 64, at most 2^14; at most 2^24 bytes
  int32_t half[3];       // whether parents have two children along x, y, z; else one
};

// What rows of a slab are like.
struct OctantRows {
  int64_t end;               // behind them
  int64_t even;              // how many have an even x among their parent's children
  bool fine;                 // they are voxels, and each is greater than the one before
  uint32_t low[2], high[2];  // of parents, y and z
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
  // Marks the parents of the rows from `begin` on whose keys are less than the limit, of none from `end` on.
  OctantRows (*mark)(const OctantMap& map, const int32_t* coords, int64_t begin, int64_t end, uint64_t limit);
  // Lists the parents of a slab and clears the map. There must be room for 64 more z and bytes than parents, and for as
  // many lines as its rows have.
  void (*list)(const OctantMap& map, const OctantRows& rows, OctantSlab* slab, OctantLine* lines, uint16_t* z,
               uint8_t* children);
};

const OctantKernels* octant_kernels_baseline();
const OctantKernels* octant_kernels_avx2();
const OctantKernels* octant_kernels_avx512();

// Writes the parents of a slab, of which the first is the row `first` of the outputs. Scratch: two numbers more than
// the slab has rows.
void write_octants_baseline(const OctantSlab& slab, const OctantLine* lines, const uint16_t* z, const uint8_t* children,
                            int64_t first, const OctantOutputs& out, uint32_t* scratch);
void write_octants_avx2(const OctantSlab& slab, const OctantLine* lines, const uint16_t* z, const uint8_t* children,
                        int64_t first, const OctantOutputs& out, uint32_t* scratch);
void write_octants_avx512(const OctantSlab& slab, const OctantLine* lines, const uint16_t* z, const uint8_t* children,
                          int64_t first, const OctantOutputs& out, uint32_t* scratch);

}  // namespace cvc::voxels
