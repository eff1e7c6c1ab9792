// Loops over the cells of a box (voxels/cells.h), compiled once per instruction set; see isa_cell_kernels.cpp.
#pragma once

#include <cstdint>

namespace cvc::voxels {

// A box of less than 2^31 cells in lexicographic order: those of a line along z, of a plane of constant x, of a batch.
struct NarrowBox {
  int32_t low[4];
  int32_t line, plane, batch;
};

struct CellKernels {
  // The voxels of cells that count from `first` on.
  void (*voxels_of)(const NarrowBox& box, int32_t first, const uint32_t* cells, int64_t n, int32_t* coords);
  // How many bits are set before each word; returns how many are.
  int64_t (*bits_before)(const uint64_t* words, int64_t n, uint32_t* before);
  // Copies to 64 bits.
  void (*widen)(const uint32_t* from, int64_t n, int64_t* to);
};

const CellKernels* cell_kernels_baseline();
const CellKernels* cell_kernels_avx2();
const CellKernels* cell_kernels_avx512();

}  // namespace cvc::voxels
