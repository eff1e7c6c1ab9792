// The operators of dense_cpu, cuts_cpu, dilate_cpu, features_cpu, resample_cpu and trilinear_cpu on CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/exec_cuda.cuh"
#include "voxels/fill.h"
#include "voxels/pipeline_features.h"
#include "voxels/pipeline_resample.h"

namespace cvc::voxels {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* write(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
Tensor new_coords(const Tensor& like, int64_t n) { return torch::stable::new_empty(like, {n, 4}, ScalarType::Int); }
Tensor new_rows(const Tensor& like, int64_t n) { return torch::stable::new_empty(like, {n}, ScalarType::Long); }

// --- sets ------------------------------------------------------------------------------------------------------------

template <class T>
OccupiedPlan plan_above(CudaExec& exec, const Tensor& occupancy, double threshold) {
  const T* const in = read<T>(occupancy);
  if constexpr (std::is_same_v<T, double>) {
    return plan_occupied(exec, occupancy.numel(), [=] CVC_HD(int64_t i) { return in[i] > threshold; });
  } else {
    // Rounded to the dtype of the occupancy, as the comparison in torch is.
    float limit = static_cast<float>(threshold);
    if constexpr (!std::is_same_v<T, uint8_t>) limit = static_cast<float>(static_cast<T>(limit));
    return plan_occupied(exec, occupancy.numel(), [=] CVC_HD(int64_t i) { return static_cast<float>(in[i]) > limit; });
  }
}

Tensor occupancy_to_coords(Tensor occupancy, double threshold) {
  CudaExec exec(occupancy);
  OccupiedPlan plan;
  switch (occupancy.scalar_type()) {
    case ScalarType::Double: plan = plan_above<double>(exec, occupancy, threshold); break;
    case ScalarType::Half: plan = plan_above<Half>(exec, occupancy, threshold); break;
    case ScalarType::BFloat16: plan = plan_above<BFloat16>(exec, occupancy, threshold); break;
    case ScalarType::Float: plan = plan_above<float>(exec, occupancy, threshold); break;
    default: plan = plan_above<uint8_t>(exec, occupancy, threshold);  // bool, too
  }
  Tensor coords = new_coords(occupancy, plan.count);
  emit_occupied(exec, plan, occupancy.size(1), occupancy.size(2), occupancy.size(3), write<int32_t>(coords));
  return coords;
}

std::tuple<Tensor, Tensor, Tensor, int64_t> voxel_coarsen(Tensor coords, int64_t fx, int64_t fy, int64_t fz) {
  CudaExec exec(coords);
  const int64_t n = coords.size(0);
  const DistinctPlan plan = plan_coarsen(exec, read<int32_t>(coords), n, static_cast<int32_t>(fx),
                                         static_cast<int32_t>(fy), static_cast<int32_t>(fz));
  const int64_t count = plan.found.faults ? 0 : plan.found.count;
  Tensor coarse = new_coords(coords, count), inverse = new_rows(coords, n), counts = new_rows(coords, count);
  if (plan.found.faults == 0)
    emit_distinct(exec, plan, n, write<int32_t>(coarse), write<int64_t>(inverse), nullptr, write<int64_t>(counts),
                  nullptr);
  return {coarse, inverse, counts, static_cast<int64_t>(plan.found.faults)};
}

std::tuple<Tensor, Tensor, bool> voxel_children(Tensor coords, std::optional<Tensor> mask) {
  CudaExec exec(coords);
  const ChildrenPlan plan =
      plan_children(exec, read<int32_t>(coords), coords.size(0), mask ? read<bool>(*mask) : nullptr);
  const int64_t count = plan.fault ? 0 : plan.count;
  Tensor fine = new_coords(coords, count), parent = new_rows(coords, count);
  if (!plan.fault) emit_children(exec, plan, read<int32_t>(coords), write<int32_t>(fine), write<int64_t>(parent));
  return {fine, parent, plan.fault};
}

std::tuple<Tensor, int64_t> voxel_dilate(Tensor coords, Tensor kernel, int64_t x, int64_t y, int64_t z) {
  CudaExec exec(coords);
  const auto narrow = [](int64_t a, int64_t b, int64_t c) {
    return Vec3<int32_t>{static_cast<int32_t>(a), static_cast<int32_t>(b), static_cast<int32_t>(c)};
  };
  const DilatePlan plan = plan_dilate(exec, read<int32_t>(coords), coords.size(0), read<bool>(kernel),
                                      narrow(kernel.size(0), kernel.size(1), kernel.size(2)), narrow(x, y, z));
  Tensor grown = new_coords(coords, plan.found.faults ? 0 : plan.found.count);
  if (plan.found.faults == 0) emit_dilate(exec, plan, write<int32_t>(grown));
  return {grown, static_cast<int64_t>(plan.found.faults)};
}

// --- cuts ------------------------------------------------------------------------------------------------------------

template <class Keep>
std::tuple<Tensor, Tensor> keep_rows(CudaExec& exec, const Tensor& coords, Keep keep) {
  const KeptPlan plan = plan_kept(exec, coords.size(0), keep);
  Tensor kept = new_coords(coords, plan.count), rows = new_rows(coords, plan.count);
  emit_kept(exec, plan, read<int32_t>(coords), write<int32_t>(kept), write<int64_t>(rows));
  return {kept, rows};
}

std::tuple<Tensor, Tensor> crop_box(Tensor coords, std::vector<int64_t> low, std::vector<int64_t> high) {
  CudaExec exec(coords);
  const Box box{{low[0], low[1], low[2]}, {high[0], high[1], high[2]}};
  const int32_t* const in = read<int32_t>(coords);
  return keep_rows(exec, coords, [=] CVC_HD(int64_t i) { return box.holds(in + 4 * i); });
}

std::tuple<Tensor, Tensor> cut_half_space(Tensor coords, Tensor planes, int64_t resolution, double lo, double hi,
                                          double slack) {
  CudaExec exec(coords);
  const HalfSpace space{read<double>(planes), planes.size(0), lo, (hi - lo) / static_cast<double>(resolution), slack};
  const int32_t* const in = read<int32_t>(coords);
  return keep_rows(exec, coords, [=] CVC_HD(int64_t i) { return space.holds(in + 4 * i); });
}

Tensor front_side(Tensor coords, Tensor depth, Tensor valid, Tensor Ks, Tensor viewmats, int64_t resolution, double lo,
                  double hi, double slack, bool ortho, bool corner_triangles) {
  CudaExec exec(coords);
  const double h = (hi - lo) / static_cast<double>(resolution);
  const FrontView view{read<double>(depth),
                       read<bool>(valid),
                       read<double>(Ks),
                       read<double>(viewmats),
                       depth.size(0),
                       depth.size(1),
                       depth.size(2),
                       lo,
                       h,
                       slack,
                       ortho,
                       corner_triangles};
  Tensor side = torch::stable::new_empty(coords, {coords.size(0)}, ScalarType::Byte);
  const int32_t* const in = read<int32_t>(coords);
  uint8_t* const out = write<uint8_t>(side);
  exec.for_each(coords.size(0), [=] CVC_HD(int64_t i) { out[i] = view.side(in + 4 * i); });
  return side;
}

std::tuple<Tensor, Tensor, Tensor> cut_with_seam(Tensor coords, Tensor keep, int64_t steps) {
  CudaExec exec(coords);
  const bool* const wanted = read<bool>(keep);
  auto [kept, rows] = keep_rows(exec, coords, [=] CVC_HD(int64_t i) { return wanted[i]; });
  Tensor seam = torch::stable::new_empty(coords, {kept.size(0)}, ScalarType::Bool);
  mark_seam(exec, read<int32_t>(coords), wanted, coords.size(0), read<int32_t>(kept), kept.size(0),
            static_cast<int>(steps), write<bool>(seam));
  return {kept, rows, seam};
}

// --- features --------------------------------------------------------------------------------------------------------

// Calls f with a number as wide as the elements: they are moved, never computed with.
template <class F>
void by_width(const Tensor& tensor, const F& f) {
  switch (tensor.element_size()) {
    case 2: return f(uint16_t{});
    case 8: return f(uint64_t{});
    default: return f(uint32_t{});
  }
}
template <class T>
T constant(const Tensor& like, double value) {
  T bits;
  char bytes[8];
  fill_row(like.scalar_type(), value, 1, bytes);
  std::memcpy(&bits, bytes, sizeof bits);
  return bits;
}

std::tuple<Tensor, int64_t> voxels_to_dense(Tensor feats, Tensor coords, int64_t batch, int64_t x, int64_t y, int64_t z,
                                            double fill, bool) {
  CudaExec exec(feats);
  Tensor dense = torch::stable::new_empty(feats, {batch, feats.size(1), x, y, z}, feats.scalar_type());
  by_width(feats, [&](auto zero) {
    using T = decltype(zero);
    write_dense(exec, read<T>(feats), read<int32_t>(coords), coords.size(0), feats.size(1), Volume{batch, x, y, z},
                constant<T>(feats, fill), write<T>(dense));
  });
  return {dense, 0};
}

std::tuple<Tensor, int64_t> voxels_from_dense(Tensor dense, Tensor coords, bool) {
  CudaExec exec(dense);
  Tensor feats = torch::stable::new_empty(dense, {coords.size(0), dense.size(1)}, dense.scalar_type());
  by_width(dense, [&](auto zero) {
    using T = decltype(zero);
    read_dense(exec, read<T>(dense), read<int32_t>(coords), coords.size(0), dense.size(1),
               Volume{dense.size(0), dense.size(2), dense.size(3), dense.size(4)}, write<T>(feats));
  });
  return {feats, 0};
}

// Sixteen bytes at a time where rows allow it.
struct alignas(16) Quad {
  uint64_t low, high;
};

std::tuple<Tensor, bool> gather_features(Tensor feats, Tensor index, double fill) {
  CudaExec exec(feats);
  const int64_t n = feats.size(0), channels = feats.size(1), m = index.size(0);
  const int64_t bytes = channels * static_cast<int64_t>(feats.element_size());
  Tensor out = torch::stable::new_empty(feats, {m, channels}, feats.scalar_type());
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (bytes % 16 == 0 && aligned(feats.const_data_ptr()) && aligned(out.const_data_ptr())) {
    Quad value;
    char pattern[16];
    fill_row(feats.scalar_type(), fill, 16 / static_cast<int64_t>(feats.element_size()), pattern);
    std::memcpy(&value, pattern, sizeof value);
    gather_rows(exec, read<Quad>(feats), n, read<int64_t>(index), m, bytes / 16, value, write<Quad>(out));
  } else {
    by_width(feats, [&](auto zero) {
      using T = decltype(zero);
      gather_rows(exec, read<T>(feats), n, read<int64_t>(index), m, channels, constant<T>(feats, fill), write<T>(out));
    });
  }
  return {out, true};
}

// Calls f with a number of the dtype of the tensor, float32 or float64.
template <class F>
void by_type(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == ScalarType::Double) {
    f(double{});
  } else {
    f(float{});
  }
}

std::tuple<Tensor, bool> reduce_features(Tensor feats, Tensor index, int64_t num_rows, int64_t reduction,
                                         bool include_self) {
  CudaExec exec(feats);
  Tensor out = torch::stable::new_empty(feats, {num_rows, feats.size(1)}, feats.scalar_type());
  by_type(feats, [&](auto zero) {
    using T = decltype(zero);
    reduce_rows(exec, read<T>(feats), read<int64_t>(index), feats.size(0), feats.size(1), num_rows,
                static_cast<Reduction>(reduction), include_self, write<T>(out));
  });
  return {out, true};
}

template <class T>
SampleGrid<T> grid_of(int64_t resolution, double lo, double hi) {
  return {static_cast<T>(lo), static_cast<T>((hi - lo) / static_cast<double>(resolution))};
}

std::tuple<Tensor, int64_t> trilinear_corners(Tensor points, std::optional<Tensor> batch, Tensor coords,
                                              int64_t resolution, double lo, double hi, bool) {
  CudaExec exec(points);
  Tensor rows = torch::stable::new_empty(points, {points.size(0), 8}, ScalarType::Long);
  by_type(points, [&](auto zero) {
    using T = decltype(zero);
    find_corners(exec, read<T>(points), batch ? read<int64_t>(*batch) : nullptr, points.size(0), read<int32_t>(coords),
                 coords.size(0), grid_of<T>(resolution, lo, hi), write<int64_t>(rows));
  });
  return {rows, 0};
}

Tensor trilinear_interpolate(Tensor feats, Tensor points, Tensor rows, int64_t resolution, double lo, double hi,
                             bool renormalize) {
  CudaExec exec(feats);
  Tensor out = torch::stable::new_empty(feats, {points.size(0), feats.size(1)}, feats.scalar_type());
  by_type(feats, [&](auto zero) {
    using T = decltype(zero);
    interpolate(exec, read<T>(feats), feats.size(1), read<T>(points), read<int64_t>(rows), points.size(0),
                grid_of<T>(resolution, lo, hi), renormalize, write<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> trilinear_interpolate_backward(Tensor grad, Tensor feats, Tensor points, Tensor rows,
                                                          int64_t resolution, double lo, double hi, bool renormalize) {
  CudaExec exec(feats);
  Tensor by_feats = torch::stable::new_empty(feats, feats.sizes(), feats.scalar_type());
  Tensor by_points = torch::stable::new_empty(points, points.sizes(), points.scalar_type());
  by_type(feats, [&](auto zero) {
    using T = decltype(zero);
    interpolate_backward(exec, read<T>(grad), read<T>(feats), feats.size(1), feats.size(0), read<T>(points),
                         read<int64_t>(rows), points.size(0), grid_of<T>(resolution, lo, hi), renormalize,
                         write<T>(by_feats), write<T>(by_points));
  });
  return {by_feats, by_points};
}

}  // namespace
}  // namespace cvc::voxels

STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CUDA, m) {
  m.impl("occupancy_to_coords", TORCH_BOX(&cvc::voxels::occupancy_to_coords));
  m.impl("voxel_coarsen", TORCH_BOX(&cvc::voxels::voxel_coarsen));
  m.impl("voxel_children", TORCH_BOX(&cvc::voxels::voxel_children));
  m.impl("voxel_dilate", TORCH_BOX(&cvc::voxels::voxel_dilate));
  m.impl("crop_box", TORCH_BOX(&cvc::voxels::crop_box));
  m.impl("cut_half_space", TORCH_BOX(&cvc::voxels::cut_half_space));
  m.impl("front_side", TORCH_BOX(&cvc::voxels::front_side));
  m.impl("cut_with_seam", TORCH_BOX(&cvc::voxels::cut_with_seam));
  m.impl("voxels_to_dense", TORCH_BOX(&cvc::voxels::voxels_to_dense));
  m.impl("voxels_from_dense", TORCH_BOX(&cvc::voxels::voxels_from_dense));
  m.impl("gather_features", TORCH_BOX(&cvc::voxels::gather_features));
  m.impl("reduce_features", TORCH_BOX(&cvc::voxels::reduce_features));
  m.impl("trilinear_corners", TORCH_BOX(&cvc::voxels::trilinear_corners));
  m.impl("trilinear_interpolate", TORCH_BOX(&cvc::voxels::trilinear_interpolate));
  m.impl("trilinear_interpolate_backward", TORCH_BOX(&cvc::voxels::trilinear_interpolate_backward));
}
