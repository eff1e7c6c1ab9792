#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "common/exec_cuda.cuh"
#include "sparse_conv/pipeline.h"

namespace cvc::sparse_conv {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The size is known beforehand: nothing is checked, nothing synchronises.
std::tuple<Tensor, int64_t> neighbor_map(Tensor coords, Tensor out_coords, std::vector<int64_t> kernel,
                                         std::vector<int64_t> stride, std::vector<int64_t> dilation,
                                         std::vector<int64_t> padding, bool transposed) {
  CudaExec exec(coords);
  const Geometry geometry = geometry_of(kernel, stride, dilation, padding, transposed);
  const int64_t rows = out_coords.size(0);
  Tensor map = torch::stable::new_empty(coords, {rows, geometry.offsets()}, ScalarType::Int);
  find_neighbors(exec, static_cast<const int32_t*>(coords.const_data_ptr()), coords.size(0),
                 static_cast<const int32_t*>(out_coords.const_data_ptr()), rows, geometry,
                 static_cast<int32_t*>(map.mutable_data_ptr()));
  return {map, 0};
}

}  // namespace
}  // namespace cvc::sparse_conv

STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CUDA, m) {
  m.impl("neighbor_map", TORCH_BOX(&cvc::sparse_conv::neighbor_map));
}
