// The test-only module: the scalar functions of the shared headers and the device pipelines run on the host, so that
// hypothesis can attack them directly. Never part of a wheel.
#include <pybind11/pybind11.h>

void bind_marching_cubes(pybind11::module_& m);
void bind_mesh(pybind11::module_& m);
void bind_narrow_band(pybind11::module_& m);
void bind_pointmap(pybind11::module_& m);
void bind_sparse_conv(pybind11::module_& m);
void bind_voxels(pybind11::module_& m);

PYBIND11_MODULE(cvctoolkit_testing, m) {
  bind_marching_cubes(m);
  bind_mesh(m);
  bind_narrow_band(m);
  bind_pointmap(m);
  bind_sparse_conv(m);
  bind_voxels(m);
}
