#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "common/exec_cuda.cuh"
#include "voxels/pipeline.h"

namespace cvc::voxels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int32_t* coords_of(const Tensor& coords) { return static_cast<const int32_t*>(coords.const_data_ptr()); }
int32_t* coords_in(Tensor& coords) { return static_cast<int32_t*>(coords.mutable_data_ptr()); }
int64_t* rows_in(Tensor& rows) { return static_cast<int64_t*>(rows.mutable_data_ptr()); }
Tensor new_coords(const Tensor& like, int64_t n) { return torch::stable::new_empty(like, {n, 4}, ScalarType::Int); }
Tensor new_rows(const Tensor& like, int64_t n) { return torch::stable::new_empty(like, {n}, ScalarType::Long); }

std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t> voxel_unique(Tensor coords) {
  CudaExec exec(coords);
  const int64_t n = coords.size(0);
  const DistinctPlan plan = plan_distinct(exec, coords_of(coords), n, nullptr, 0);
  const int64_t count = plan.found.faults ? 0 : plan.found.count;
  Tensor distinct = new_coords(coords, count), inverse = new_rows(coords, n), counts = new_rows(coords, count),
         first = new_rows(coords, count);
  if (plan.found.faults == 0)
    emit_distinct(exec, plan, n, coords_in(distinct), rows_in(inverse), nullptr, rows_in(counts), rows_in(first));
  return {distinct, inverse, counts, first, static_cast<int64_t>(plan.found.faults)};
}

std::tuple<Tensor, Tensor, Tensor, int64_t> voxel_union(Tensor a, Tensor b) {
  CudaExec exec(a);
  const int64_t na = a.size(0), nb = b.size(0);
  const DistinctPlan plan = plan_distinct(exec, coords_of(a), na, coords_of(b), nb);
  Tensor coords = new_coords(a, plan.found.faults ? 0 : plan.found.count), index_a = new_rows(a, na),
         index_b = new_rows(a, nb);
  if (plan.found.faults == 0)
    emit_distinct(exec, plan, na, coords_in(coords), rows_in(index_a), rows_in(index_b), nullptr, nullptr);
  return {coords, index_a, index_b, static_cast<int64_t>(plan.found.faults)};
}

std::tuple<Tensor, Tensor, Tensor, int64_t> select(const Tensor& a, const Tensor& b, bool in_b, bool assume_unique) {
  CudaExec exec(a);
  const SelectPlan plan = plan_select(exec, coords_of(a), a.size(0), coords_of(b), b.size(0), in_b, assume_unique);
  const int64_t count = plan.found.faults ? 0 : plan.found.count;
  Tensor coords = new_coords(a, count), index_a = new_rows(a, count), index_b = new_rows(a, in_b ? count : 0);
  if (plan.found.faults == 0)
    emit_select(exec, plan, coords_in(coords), rows_in(index_a), in_b ? rows_in(index_b) : nullptr);
  return {coords, index_a, index_b, static_cast<int64_t>(plan.found.faults)};
}

std::tuple<Tensor, Tensor, Tensor, int64_t> voxel_intersection(Tensor a, Tensor b, bool assume_unique) {
  return select(a, b, true, assume_unique);
}

std::tuple<Tensor, Tensor, int64_t> voxel_difference(Tensor a, Tensor b, bool assume_unique) {
  auto [coords, index_a, index_b, faults] = select(a, b, false, assume_unique);
  return {coords, index_a, faults};
}

// From here on sizes are known beforehand: nothing is checked, nothing synchronises.

std::tuple<Tensor, int64_t> voxel_isin(Tensor a, Tensor b) {
  CudaExec exec(a);
  Tensor out = torch::stable::new_empty(a, {a.size(0)}, ScalarType::Bool);
  is_in(exec, coords_of(a), a.size(0), coords_of(b), b.size(0), static_cast<bool*>(out.mutable_data_ptr()));
  return {out, 0};
}

std::tuple<Tensor, int64_t> voxel_lookup(Tensor coords, Tensor query, bool) {
  CudaExec exec(coords);
  Tensor out = new_rows(query, query.size(0));
  look_up_rows(exec, coords_of(coords), coords.size(0), coords_of(query), query.size(0), rows_in(out));
  return {out, 0};
}

std::tuple<Tensor, int64_t> voxel_keys(Tensor coords) {
  CudaExec exec(coords);
  Tensor out = new_rows(coords, coords.size(0));
  write_keys(exec, coords_of(coords), coords.size(0), rows_in(out));
  return {out, 0};
}

std::tuple<Tensor, Tensor, Tensor, int64_t> voxel_sort(Tensor coords, int64_t order, int64_t block_size) {
  CudaExec exec(coords);
  const int64_t n = coords.size(0);
  Tensor sorted = new_coords(coords, n), permutation = new_rows(coords, n), inverse = new_rows(coords, n);
  sort_rows(exec, coords_of(coords), n, static_cast<int>(order), block_size, coords_in(sorted), rows_in(permutation),
            rows_in(inverse));
  return {sorted, permutation, inverse, 0};
}

std::tuple<Tensor, int64_t> encode(const Tensor& coords, bool hilbert) {
  CudaExec exec(coords);
  const auto sizes = coords.sizes();
  Tensor codes = torch::stable::new_empty(coords, sizes.slice(0, sizes.size() - 1), ScalarType::Long);
  encode_cells(exec, coords_of(coords), codes.numel(), hilbert, rows_in(codes));
  return {codes, 0};
}

std::tuple<Tensor, int64_t> decode(const Tensor& codes, bool hilbert) {
  CudaExec exec(codes);
  std::vector<int64_t> sizes(codes.sizes().begin(), codes.sizes().end());
  sizes.push_back(3);
  Tensor coords = torch::stable::new_empty(codes, sizes, ScalarType::Int);
  decode_cells(exec, static_cast<const int64_t*>(codes.const_data_ptr()), codes.numel(), hilbert, coords_in(coords));
  return {coords, 0};
}

std::tuple<Tensor, int64_t> morton_encode(Tensor coords) { return encode(coords, false); }
std::tuple<Tensor, int64_t> hilbert_encode(Tensor coords) { return encode(coords, true); }
std::tuple<Tensor, int64_t> morton_decode(Tensor codes) { return decode(codes, false); }
std::tuple<Tensor, int64_t> hilbert_decode(Tensor codes) { return decode(codes, true); }

}  // namespace
}  // namespace cvc::voxels

STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CUDA, m) {
  m.impl("voxel_keys", TORCH_BOX(&cvc::voxels::voxel_keys));
  m.impl("voxel_sort", TORCH_BOX(&cvc::voxels::voxel_sort));
  m.impl("morton_encode", TORCH_BOX(&cvc::voxels::morton_encode));
  m.impl("morton_decode", TORCH_BOX(&cvc::voxels::morton_decode));
  m.impl("hilbert_encode", TORCH_BOX(&cvc::voxels::hilbert_encode));
  m.impl("hilbert_decode", TORCH_BOX(&cvc::voxels::hilbert_decode));
  m.impl("voxel_unique", TORCH_BOX(&cvc::voxels::voxel_unique));
  m.impl("voxel_union", TORCH_BOX(&cvc::voxels::voxel_union));
  m.impl("voxel_intersection", TORCH_BOX(&cvc::voxels::voxel_intersection));
  m.impl("voxel_difference", TORCH_BOX(&cvc::voxels::voxel_difference));
  m.impl("voxel_isin", TORCH_BOX(&cvc::voxels::voxel_isin));
  m.impl("voxel_lookup", TORCH_BOX(&cvc::voxels::voxel_lookup));
}
