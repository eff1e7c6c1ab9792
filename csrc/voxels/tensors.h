// Tensors of voxels and of their rows.
#pragma once

#include "voxels/tasks.h"

namespace cvc::voxels {

inline const int32_t* coords_of(const torch::stable::Tensor& coords) {
  return static_cast<const int32_t*>(coords.const_data_ptr());
}
inline torch::stable::Tensor new_coords(const torch::stable::Tensor& like, int64_t n) {
  return new_tensor(like, {n, 4}, torch::headeronly::ScalarType::Int);
}
inline torch::stable::Tensor new_rows(const torch::stable::Tensor& like, int64_t n) {
  return new_tensor(like, {n}, torch::headeronly::ScalarType::Long);
}

}  // namespace cvc::voxels
