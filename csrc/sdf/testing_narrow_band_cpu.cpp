// The CPU path with the kernel of testing_narrow_band_wide.cpp.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#pragma GCC diagnostic ignored "-Wsubobject-linkage"  // of source files included on purpose
#include "sdf/narrow_band_bins.cpp"
#include "sdf/narrow_band_groups.cpp"
#include "sdf/narrow_band_rows.cpp"

namespace cvc::narrow_band {
Kernels narrow_band_kernels_wide();
void narrow_band_bounds(const float* triangles, int n, const float* x, float* by_vertices, float* by_box);
void narrow_band_spheres(const double* triangles, int n, int size, double band, double* spheres, int32_t* kind);
}  // namespace cvc::narrow_band

namespace py = pybind11;
using namespace cvc::narrow_band;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class Real>
py::tuple band(Array<Real> vertices, Array<int64_t> faces, int64_t resolution, double width, double lo, double hi) {
  const Mesh<Real, int64_t> mesh{vertices.data(), faces.data(), vertices.shape(0), faces.shape(0)};
  const int32_t size = static_cast<int32_t>(resolution);
  const Grid grid{{lo, lo, lo}, static_cast<double>(resolution) / (hi - lo), {size, size, size}, width};
  const Parallel one_thread{1, [](int64_t n, const std::function<void(int64_t)>& task) {
                              for (int64_t i = 0; i < n; ++i) task(i);
                            }};
  Array<int32_t> coords;
  Array<Real> distance;
  Array<int64_t> face;
  const auto allocate = [&](int64_t n) {
    coords = Array<int32_t>({n, int64_t{4}});
    distance = Array<Real>(n);
    face = Array<int64_t>(n);
    return Output<Real>{coords.mutable_data(), distance.mutable_data(), face.mutable_data()};
  };
  const Status status =
      narrow_band<Real, int64_t>(mesh, nullptr, grid, narrow_band_kernels_wide(), one_thread, allocate);
  return py::make_tuple(coords, distance, face, static_cast<int64_t>(status));
}

py::tuple bounds(Array<float> triangles, Array<float> x) {
  const int n = static_cast<int>(triangles.shape(0));
  Array<float> by_vertices(n);
  float by_box;
  narrow_band_bounds(triangles.data(), n, x.data(), by_vertices.mutable_data(), &by_box);
  return py::make_tuple(by_vertices, by_box);
}

py::tuple spheres(Array<double> triangles, int size, double width) {
  const int n = static_cast<int>(triangles.shape(0));
  if (n > FaceSpheres::kFaces) throw py::value_error("too many triangles");
  Array<double> out({n, 4});
  Array<int32_t> kind(n);
  narrow_band_spheres(triangles.data(), n, size, width, out.mutable_data(), kind.mutable_data());
  return py::make_tuple(out, kind);
}

}  // namespace

void bind_narrow_band_wide(py::module_& m) {
  m.def("narrow_band_wide", &band<float>);
  m.def("narrow_band_wide", &band<double>);
  m.def("narrow_band_bounds", &bounds);
  m.def("narrow_band_spheres", &spheres);
}
