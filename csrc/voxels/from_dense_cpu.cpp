// Features of voxels out of a dense volume [B, C, X, Y, Z]; the kernels are in isa_gather_cells.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "common/isa.h"
#include "voxels/gather_cells.h"
#include "voxels/keys.h"
#include "voxels/tasks.h"
#include "voxels/volume_order.h"

namespace cvc::voxels {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, int64_t> voxels_from_dense(Tensor dense, Tensor coords, bool assume_unique) {
  const int64_t n = coords.size(0), channels = dense.size(1);
  const int64_t width = static_cast<int64_t>(dense.element_size());
  const Volume volume = volume_of(dense.size(0), dense.size(2), dense.size(3), dense.size(4));
  const int32_t* const voxels = static_cast<const int32_t*>(coords.const_data_ptr());
  Tensor feats = new_tensor(dense, {n, channels}, dense.scalar_type());
  const bool large = n * channels * width > (int64_t{4} << 20);
  const CellGather gather{dense.const_data_ptr(), volume, channels, width, voxels, data_of<char>(feats), large};
  std::atomic<bool> inside{true}, ascending{true};
  for_each_range_apart(n, 1 << 12, [&](int64_t begin, int64_t end) {
    const Order order = CVC_ISA_PICK(gather_cells)(gather, begin, end);
    if (!order.inside) inside.store(false, std::memory_order_relaxed);
    if (!order.ascending) ascending.store(false, std::memory_order_relaxed);
  });
  if (!inside) return {feats, kOutOfRange};
  if (!assume_unique && !ascending) {
    Buffer<int64_t> cells(n);
    order_of(voxels, n, volume, cells.data());
    if (any_twice(cells.data(), n, dense.size(0) * volume.cells())) return {feats, kDuplicate};
  }
  return {feats, 0};
}

}  // namespace
}  // namespace cvc::voxels

STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def("voxels_from_dense(Tensor dense, Tensor coords, bool assume_unique) -> (Tensor, int)");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("voxels_from_dense", TORCH_BOX(&cvc::voxels::voxels_from_dense));
}
