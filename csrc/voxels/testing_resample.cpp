// The pipelines of cuda_resample.cu, run on the host.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "voxels/pipeline_features.h"
#include "voxels/pipeline_resample.h"

namespace py = pybind11;
using cvc::HostExec;
using cvc::Vec3;
using namespace cvc::voxels;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Coords = Array<int32_t>;
using Rows = Array<int64_t>;
using Shape = std::array<int64_t, 3>;

Coords new_coords(int64_t n) { return Coords({n, int64_t{4}}); }

Coords occupied(Array<float> occupancy, float threshold) {
  HostExec exec;
  const float* const in = occupancy.data();
  const OccupiedPlan plan = plan_occupied(exec, occupancy.size(), [=](int64_t i) { return in[i] > threshold; });
  Coords coords = new_coords(plan.count);
  emit_occupied(exec, plan, occupancy.shape(1), occupancy.shape(2), occupancy.shape(3), coords.mutable_data());
  return coords;
}

py::tuple coarsen(Coords coords, Shape factor) {
  HostExec exec;
  const int64_t n = coords.shape(0);
  const DistinctPlan plan = plan_coarsen(exec, coords.data(), n, static_cast<int32_t>(factor[0]),
                                         static_cast<int32_t>(factor[1]), static_cast<int32_t>(factor[2]));
  const int64_t count = plan.found.faults ? 0 : plan.found.count;
  Coords coarse = new_coords(count);
  Rows inverse(n), counts(count);
  if (plan.found.faults == 0)
    emit_distinct(exec, plan, n, coarse.mutable_data(), inverse.mutable_data(), nullptr, counts.mutable_data(),
                  nullptr);
  return py::make_tuple(coarse, inverse, counts, plan.found.faults);
}

py::tuple children(Coords coords, std::optional<Array<bool>> mask) {
  HostExec exec;
  const ChildrenPlan plan = plan_children(exec, coords.data(), coords.shape(0), mask ? mask->data() : nullptr);
  const int64_t count = plan.fault ? 0 : plan.count;
  Coords fine = new_coords(count);
  Rows parent(count);
  if (!plan.fault) emit_children(exec, plan, coords.data(), fine.mutable_data(), parent.mutable_data());
  return py::make_tuple(fine, parent, plan.fault);
}

py::tuple dilate(Coords coords, Array<bool> kernel, Shape shape) {
  HostExec exec;
  const auto narrow = [](auto size) {
    return Vec3<int32_t>{static_cast<int32_t>(size[0]), static_cast<int32_t>(size[1]), static_cast<int32_t>(size[2])};
  };
  const DilatePlan plan =
      plan_dilate(exec, coords.data(), coords.shape(0), kernel.data(), narrow(kernel.shape()), narrow(shape));
  Coords grown = new_coords(plan.found.faults ? 0 : plan.found.count);
  if (plan.found.faults == 0) emit_dilate(exec, plan, grown.mutable_data());
  return py::make_tuple(grown, plan.found.faults);
}

template <class Keep>
py::tuple keep_rows(HostExec& exec, const Coords& coords, Keep keep) {
  const KeptPlan plan = plan_kept(exec, coords.shape(0), keep);
  Coords kept = new_coords(plan.count);
  Rows rows(plan.count);
  emit_kept(exec, plan, coords.data(), kept.mutable_data(), rows.mutable_data());
  return py::make_tuple(kept, rows);
}

py::tuple crop(Coords coords, Shape low, Shape high) {
  HostExec exec;
  const Box box{{low[0], low[1], low[2]}, {high[0], high[1], high[2]}};
  const int32_t* const in = coords.data();
  return keep_rows(exec, coords, [=](int64_t i) { return box.holds(in + 4 * i); });
}

py::tuple half_space(Coords coords, Array<double> planes, int64_t resolution, double lo, double hi, double slack) {
  HostExec exec;
  const HalfSpace space{planes.data(), planes.shape(0), lo, (hi - lo) / static_cast<double>(resolution), slack};
  const int32_t* const in = coords.data();
  return keep_rows(exec, coords, [=](int64_t i) { return space.holds(in + 4 * i); });
}

py::tuple seam(Coords coords, Array<bool> keep, int steps) {
  HostExec exec;
  const bool* const wanted = keep.data();
  const py::tuple kept = keep_rows(exec, coords, [=](int64_t i) { return wanted[i]; });
  const Coords stay = kept[0].cast<Coords>();
  Array<bool> out(stay.shape(0));
  mark_seam(exec, coords.data(), wanted, coords.shape(0), stay.data(), stay.shape(0), steps, out.mutable_data());
  return py::make_tuple(kept[0], kept[1], out);
}

Array<float> to_dense(Coords coords, Array<float> feats, int64_t batch, Shape shape, float fill) {
  HostExec exec;
  Array<float> dense({batch, int64_t{feats.shape(1)}, shape[0], shape[1], shape[2]});
  write_dense(exec, feats.data(), coords.data(), coords.shape(0), feats.shape(1),
              Volume{batch, shape[0], shape[1], shape[2]}, fill, dense.mutable_data());
  return dense;
}

Array<float> from_dense(Array<float> dense, Coords coords) {
  HostExec exec;
  Array<float> feats({int64_t{coords.shape(0)}, int64_t{dense.shape(1)}});
  read_dense(exec, dense.data(), coords.data(), coords.shape(0), dense.shape(1),
             Volume{dense.shape(0), dense.shape(2), dense.shape(3), dense.shape(4)}, feats.mutable_data());
  return feats;
}

Array<float> gather(Array<float> feats, Rows index, float fill) {
  HostExec exec;
  Array<float> out({int64_t{index.shape(0)}, int64_t{feats.shape(1)}});
  gather_rows(exec, feats.data(), feats.shape(0), index.data(), index.shape(0), feats.shape(1), fill,
              out.mutable_data());
  return out;
}

Array<double> reduce(Array<double> feats, Rows index, int64_t num_rows, int64_t reduction, bool include_self) {
  HostExec exec;
  Array<double> out({num_rows, int64_t{feats.shape(1)}});
  reduce_rows(exec, feats.data(), index.data(), feats.shape(0), feats.shape(1), num_rows,
              static_cast<Reduction>(reduction), include_self, out.mutable_data());
  return out;
}

SampleGrid<double> grid_of(int64_t resolution, double lo, double hi) {
  return {lo, (hi - lo) / static_cast<double>(resolution)};
}

Rows corners(Array<double> points, std::optional<Rows> batch, Coords coords, int64_t resolution, double lo, double hi) {
  HostExec exec;
  Rows rows({int64_t{points.shape(0)}, int64_t{8}});
  find_corners(exec, points.data(), batch ? batch->data() : nullptr, points.shape(0), coords.data(), coords.shape(0),
               grid_of(resolution, lo, hi), rows.mutable_data());
  return rows;
}

Array<double> sample(Array<double> feats, Array<double> points, Rows rows, int64_t resolution, double lo, double hi,
                     bool renormalize) {
  HostExec exec;
  Array<double> out({int64_t{points.shape(0)}, int64_t{feats.shape(1)}});
  interpolate(exec, feats.data(), feats.shape(1), points.data(), rows.data(), points.shape(0),
              grid_of(resolution, lo, hi), renormalize, out.mutable_data());
  return out;
}

py::tuple sample_backward(Array<double> grad, Array<double> feats, Array<double> points, Rows rows, int64_t resolution,
                          double lo, double hi, bool renormalize) {
  HostExec exec;
  Array<double> by_feats({int64_t{feats.shape(0)}, int64_t{feats.shape(1)}}),
      by_points({int64_t{points.shape(0)}, int64_t{3}});
  interpolate_backward(exec, grad.data(), feats.data(), feats.shape(1), feats.shape(0), points.data(), rows.data(),
                       points.shape(0), grid_of(resolution, lo, hi), renormalize, by_feats.mutable_data(),
                       by_points.mutable_data());
  return py::make_tuple(by_feats, by_points);
}

}  // namespace

void bind_voxels_resample(py::module_& m) {
  m.def("occupancy_to_coords_pipeline", &occupied);
  m.def("voxel_coarsen_pipeline", &coarsen);
  m.def("voxel_children_pipeline", &children);
  m.def("voxel_dilate_pipeline", &dilate);
  m.def("crop_box_pipeline", &crop);
  m.def("cut_half_space_pipeline", &half_space);
  m.def("cut_with_seam_pipeline", &seam);
  m.def("to_dense_pipeline", &to_dense);
  m.def("from_dense_pipeline", &from_dense);
  m.def("gather_features_pipeline", &gather);
  m.def("reduce_features_pipeline", &reduce);
  m.def("trilinear_corners_pipeline", &corners);
  m.def("trilinear_interpolate_pipeline", &sample);
  m.def("trilinear_interpolate_backward_pipeline", &sample_backward);
}
