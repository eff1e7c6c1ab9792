// Neighbour maps and the voxels that a convolution reaches, on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "sparse_conv/neighbors.h"
#include "sparse_conv/reach.h"

namespace cvc::sparse_conv {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using voxels::Ascending;

constexpr int64_t kRowsPerTask = 1024;

// Returns the map and the faults of the sets; with faults the map is not filled.
std::tuple<Tensor, int64_t> neighbor_map(Tensor coords, Tensor out_coords, std::vector<int64_t> kernel,
                                         std::vector<int64_t> stride, std::vector<int64_t> dilation,
                                         std::vector<int64_t> padding, bool transposed) {
  const Geometry geometry = geometry_of(kernel, stride, dilation, padding, transposed);
  const int64_t rows = out_coords.size(0), offsets = geometry.offsets();
  const Ascending in(coords);
  const bool same = coords.const_data_ptr() == out_coords.const_data_ptr() && coords.size(0) == rows;
  const std::optional<Ascending> others = same ? std::nullopt : std::optional<Ascending>(std::in_place, out_coords);
  const Ascending& out = same ? in : *others;

  int64_t faults = in.faults;
  if (!faults && !in.distinct) faults |= voxels::kDuplicate;
  if (out.faults) faults |= voxels::kOutOfRangeSecond;
  Tensor map = voxels::new_tensor(coords, {rows, offsets}, ScalarType::Int);
  if (faults) return {map, faults};
  const int32_t* const voxel = static_cast<const int32_t*>(out_coords.const_data_ptr());
  int32_t* const found = voxels::data_of<int32_t>(map);
  torch::stable::parallel_for(0, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    Cursors cursors(geometry, in);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t o = out.row(i);
      cursors.find(voxel + 4 * o, found + o * offsets);
    }
  });
  return {map, 0};
}

// Returns the voxels in ascending order and the faults of the given ones.
std::tuple<Tensor, int64_t> conv_out_coords(Tensor coords, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                                            std::vector<int64_t> dilation, std::vector<int64_t> padding,
                                            bool transposed, std::vector<int64_t> extent) {
  const Geometry geometry = geometry_of(kernel, stride, dilation, padding, transposed);
  const Ascending in(coords);
  if (in.faults) return {torch::stable::new_empty(coords, {0, 4}, ScalarType::Int), in.faults};
  const std::vector<Sight> seen = sights(in, geometry, extent[0]);
  std::vector<int64_t> planes;  // where they begin in `seen`
  for (size_t i = 0; i < seen.size(); ++i)
    if (i == 0 || seen[i].bx != seen[i - 1].bx) planes.push_back(static_cast<int64_t>(i));
  const voxels::Chunks chunks(static_cast<int64_t>(planes.size()), 1);
  planes.push_back(static_cast<int64_t>(seen.size()));

  std::vector<std::vector<uint32_t>> cells(chunks.count);
  std::vector<std::vector<int64_t>> ends(chunks.count);
  std::vector<int64_t> first(chunks.count, 0);
  voxels::for_each_task(chunks.count, [&](int64_t c) {
    Reach reach(in, geometry, extent.data());
    for (int64_t p = chunks.begin(c); p < chunks.end(c); ++p) {
      reach.plane(seen.data() + planes[p], seen.data() + planes[p + 1], cells[c]);
      ends[c].push_back(static_cast<int64_t>(cells[c].size()));
    }
    first[c] = static_cast<int64_t>(cells[c].size());
  });
  Tensor result = voxels::new_tensor(coords, {voxels::running_sums(first), 4}, ScalarType::Int);
  int32_t* const out = voxels::data_of<int32_t>(result);
  voxels::for_each_task(chunks.count, [&](int64_t c) {
    int32_t* row = out + 4 * first[c];
    int64_t i = 0;
    for (int64_t p = chunks.begin(c); p < chunks.end(c); ++p)
      for (; i < ends[c][p - chunks.begin(c)]; ++i, row += 4)
        voxels::write_voxel(seen[planes[p]].bx << 32 | cells[c][i], row);
  });
  return {result, 0};
}

// inverse[i, k] = o where map[o, k] = i; and whether some entry has two such rows or points beyond the input.
std::tuple<Tensor, bool> invert_neighbor_map(Tensor map, int64_t rows_in) {
  const int64_t rows_out = map.size(0), offsets = map.size(1);
  Tensor inverse = torch::stable::new_empty(map, {rows_in, offsets}, ScalarType::Int);
  const int32_t* const in = static_cast<const int32_t*>(map.const_data_ptr());
  int32_t* const out = static_cast<int32_t*>(inverse.mutable_data_ptr());
  advise_huge_pages(out, sizeof(int32_t) * rows_in * offsets);
  torch::stable::parallel_for(0, rows_in * offsets, 1 << 18,
                              [&](int64_t begin, int64_t end) { std::fill(out + begin, out + end, -1); });
  std::atomic<bool> fault{false};
  torch::stable::parallel_for(0, rows_out, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t k = 0; k < offsets; ++k) {
        const int32_t i = in[o * offsets + k];
        if (i < 0) continue;
        if (i >= rows_in) {
          fault = true;
          continue;
        }
        int32_t expected = -1;
        if (!std::atomic_ref<int32_t>(out[i * offsets + k])
                 .compare_exchange_strong(expected, static_cast<int32_t>(o), std::memory_order_relaxed))
          fault = true;
      }
  });
  return {inverse, fault.load()};
}

}  // namespace
}  // namespace cvc::sparse_conv

// All tensors are contiguous, coordinates and maps int32: Python sees to it.
STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def(
      "neighbor_map(Tensor coords, Tensor out_coords, int[] kernel_size, int[] stride, int[] dilation, int[] padding, "
      "bool transposed) -> (Tensor, int)");
  m.def(
      "conv_out_coords(Tensor coords, int[] kernel_size, int[] stride, int[] dilation, int[] padding, bool transposed, "
      "int[] extent) -> (Tensor, int)");
  m.def("invert_neighbor_map(Tensor map, int rows_in) -> (Tensor, bool)");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("neighbor_map", TORCH_BOX(&cvc::sparse_conv::neighbor_map));
  m.impl("conv_out_coords", TORCH_BOX(&cvc::sparse_conv::conv_out_coords));
  m.impl("invert_neighbor_map", TORCH_BOX(&cvc::sparse_conv::invert_neighbor_map));
}
