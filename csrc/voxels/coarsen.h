// Coarser sets of voxels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace cvc::voxels {

// Division by a number known late, without the divider: exact for 16-bit numerators.
struct Divider {
  explicit Divider(int64_t d) : value(static_cast<uint32_t>(d)), magic((uint64_t{1} << 32) / value + 1) {}
  uint32_t operator()(uint32_t n) const { return value == 1 ? n : static_cast<uint32_t>(n * magic >> 32); }
  uint32_t value;
  uint64_t magic;
};

struct Coarse {
  torch::stable::Tensor coords, inverse, counts;
};

// Whatever the order and the box of the voxels: sorted, then line by line (resample_cpu.cpp). Also returns faults.
std::tuple<Coarse, int64_t> coarsen_by_lines(const torch::stable::Tensor& coords, int64_t fx, int64_t fy, int64_t fz);

}  // namespace cvc::voxels
