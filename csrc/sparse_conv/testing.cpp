#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "sparse_conv/pipeline.h"

namespace py = pybind11;

namespace {

using Coords = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Triple = std::vector<int64_t>;

Coords neighbor_map(Coords coords, Coords out, Triple kernel, Triple stride, Triple dilation, Triple padding,
                    bool transposed) {
  cvc::HostExec exec;
  const auto geometry = cvc::sparse_conv::geometry_of(kernel, stride, dilation, padding, transposed);
  Coords map({out.shape(0), static_cast<py::ssize_t>(geometry.offsets())});
  cvc::sparse_conv::find_neighbors(exec, coords.data(), coords.shape(0), out.data(), out.shape(0), geometry,
                                   map.mutable_data());
  return map;
}

}  // namespace

void bind_sparse_conv(py::module_& m) { m.def("neighbor_map_pipeline", &neighbor_map); }
