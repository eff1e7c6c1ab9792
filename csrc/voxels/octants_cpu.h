// Coarser sets of voxels whose parents have eight children or fewer.
#pragma once

#include <optional>

#include "voxels/octants.h"
#include "voxels/scan.h"
#include "voxels/slabs.h"

namespace cvc::voxels {

// The parents of voxels in order, none of them given twice.
class Octants {
 public:
  // Without a value: voxels out of order, too far apart for a map of bytes, or more than two along an axis of a parent.
  static std::optional<Octants> of(const torch::stable::Tensor& coords, const Factor& factor);

  // Writes all parents.
  void write(const OctantOutputs& out) const;

  int64_t parents = 0;

 private:
  struct Task {
    int64_t begin, end;  // rows
    int64_t first = 0;   // row of the first parent
    int64_t parents = 0;
    std::vector<OctantSlab> slabs;
    std::vector<OctantLine> lines;
  };
  struct Map;  // of a thread

  Octants(const torch::stable::Tensor& coords, const Factor& factor);
  bool list(int64_t t, Map& map);
  // What is told of the parents of a task begins here.
  int64_t room(int64_t t) const { return tasks_[t].begin + 64 * t; }

  const OrderedRows rows_;
  const Factor factor_;
  const OctantKernels* const kernels_;
  std::vector<Task> tasks_;
  Buffer<uint8_t> children_;
  Buffer<uint16_t> z_;
};

}  // namespace cvc::voxels
