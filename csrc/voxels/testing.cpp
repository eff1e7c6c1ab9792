#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "voxels/pipeline.h"

namespace py = pybind11;
using cvc::HostExec;
using namespace cvc::voxels;

namespace {

using Coords = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Rows = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

Coords new_coords(int64_t n, int64_t columns = 4) { return Coords({n, columns}); }

py::tuple unique(Coords coords) {
  HostExec exec;
  const int64_t n = coords.shape(0);
  const DistinctPlan plan = plan_distinct(exec, coords.data(), n, nullptr, 0);
  const int64_t count = plan.found.faults ? 0 : plan.found.count;
  Coords distinct = new_coords(count);
  Rows inverse(n), counts(count), first(count);
  if (!plan.found.faults)
    emit_distinct(exec, plan, n, distinct.mutable_data(), inverse.mutable_data(), nullptr, counts.mutable_data(),
                  first.mutable_data());
  return py::make_tuple(distinct, inverse, counts, first, plan.found.faults);
}

py::tuple unite(Coords a, Coords b) {
  HostExec exec;
  const DistinctPlan plan = plan_distinct(exec, a.data(), a.shape(0), b.data(), b.shape(0));
  Coords coords = new_coords(plan.found.faults ? 0 : plan.found.count);
  Rows index_a(a.shape(0)), index_b(b.shape(0));
  if (!plan.found.faults)
    emit_distinct(exec, plan, a.shape(0), coords.mutable_data(), index_a.mutable_data(), index_b.mutable_data(),
                  nullptr, nullptr);
  return py::make_tuple(coords, index_a, index_b, plan.found.faults);
}

py::tuple select(Coords a, Coords b, bool in_b, bool assume_unique) {
  HostExec exec;
  const SelectPlan plan = plan_select(exec, a.data(), a.shape(0), b.data(), b.shape(0), in_b, assume_unique);
  const int64_t count = plan.found.faults ? 0 : plan.found.count;
  Coords coords = new_coords(count);
  Rows index_a(count), index_b(in_b ? count : 0);
  if (!plan.found.faults)
    emit_select(exec, plan, coords.mutable_data(), index_a.mutable_data(), in_b ? index_b.mutable_data() : nullptr);
  if (in_b) return py::make_tuple(coords, index_a, index_b, plan.found.faults);
  return py::make_tuple(coords, index_a, plan.found.faults);
}

py::array_t<bool> isin(Coords a, Coords b) {
  HostExec exec;
  py::array_t<bool> out(a.shape(0));
  is_in(exec, a.data(), a.shape(0), b.data(), b.shape(0), out.mutable_data());
  return out;
}

Rows lookup(Coords coords, Coords query) {
  HostExec exec;
  Rows out(query.shape(0));
  look_up_rows(exec, coords.data(), coords.shape(0), query.data(), query.shape(0), out.mutable_data());
  return out;
}

Rows keys(Coords coords) {
  HostExec exec;
  Rows out(coords.shape(0));
  write_keys(exec, coords.data(), coords.shape(0), out.mutable_data());
  return out;
}

py::tuple sort(Coords coords, int order, int64_t block) {
  HostExec exec;
  const int64_t n = coords.shape(0);
  Coords sorted = new_coords(n);
  Rows permutation(n), inverse(n);
  sort_rows(exec, coords.data(), n, order, block, sorted.mutable_data(), permutation.mutable_data(),
            inverse.mutable_data());
  return py::make_tuple(sorted, permutation, inverse);
}

Rows encode(Coords coords, bool hilbert) {
  HostExec exec;
  Rows codes(coords.shape(0));
  encode_cells(exec, coords.data(), coords.shape(0), hilbert, codes.mutable_data());
  return codes;
}

Coords decode(Rows codes, bool hilbert) {
  HostExec exec;
  Coords coords = new_coords(codes.shape(0), 3);
  decode_cells(exec, codes.data(), codes.shape(0), hilbert, coords.mutable_data());
  return coords;
}

}  // namespace

void bind_voxels_resample(py::module_& m);

void bind_voxels(py::module_& m) {
  bind_voxels_resample(m);
  m.def("voxel_unique_pipeline", &unique);
  m.def("voxel_union_pipeline", &unite);
  m.def("voxel_intersection_pipeline",
        [](Coords a, Coords b, bool assume_unique) { return select(a, b, true, assume_unique); });
  m.def("voxel_difference_pipeline",
        [](Coords a, Coords b, bool assume_unique) { return select(a, b, false, assume_unique); });
  m.def("voxel_isin_pipeline", &isin);
  m.def("voxel_lookup_pipeline", &lookup);
  m.def("voxel_keys_pipeline", &keys);
  m.def("voxel_sort_pipeline", &sort);
  m.def("curve_encode_pipeline", &encode);
  m.def("curve_decode_pipeline", &decode);
}
