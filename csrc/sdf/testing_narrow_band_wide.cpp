// The block kernel with 16 lanes, as AVX-512 has, in generic code that runs anywhere; and the bounds that it culls by.
#pragma GCC diagnostic ignored "-Wpsabi"
#define CVC_ISA wide
#define CVC_SIMD_BYTES 64
#include "sdf/isa_narrow_band.cpp"

namespace cvc::narrow_band {

// Of at most kGroup triangles [n, 3, 3] around the origin: the least squared distances [n] to them that their vertices
// allow, seen from x, and the distance to the box around all.
void narrow_band_bounds(const float* triangles, int n, const float* x, float* by_vertices, float* by_box) {
  Corners group;
  for (int l = 0; l < kF; ++l)
    for (int k = 0; k < 9; ++k) group.t[0][k][l] = triangles[9 * (l < n ? l : 0) + k];
  group.pad[0] = F{};
  F least = F{} + 1e30f;
  for (int corner = 0; corner < 9; corner += 3) {
    F d2{};
    for (int k = 0; k < 3; ++k) {
      const F d = group.t[0][corner + k] - x[k];
      d2 += d * d;
    }
    least = vmin(least, d2);
  }
  least -= circle_square(group.t[0]) * kCircleRoom;
  for (int l = 0; l < n; ++l) by_vertices[l] = least[l];
  float numbers[kGroupFields], d2 = 0;
  GroupList box;
  for (int f = 0; f < kGroupFields; ++f) box.field[f] = numbers + f;
  bound_group(group, box, 0);
  const float *u = numbers + kU, *w = numbers + kW, from[3] = {x[0] - numbers[0], x[1] - numbers[1], x[2] - numbers[2]};
  const float axis[3][3] = {{u[0], u[1], u[2]},
                            {w[0], w[1], w[2]},
                            {u[1] * w[2] - u[2] * w[1], u[2] * w[0] - u[0] * w[2], u[0] * w[1] - u[1] * w[0]}};
  for (int k = 0; k < 3; ++k) {
    const float along = __builtin_fabsf(dot(axis[k], from)), out = along - numbers[kExtent + k];
    d2 += out > 0 ? out * out : 0;
  }
  *by_box = d2;
}

// Spheres of at most FaceSpheres::kFaces triangles [n, 3, 3] in voxels: centres and radii [n, 4] as they are unpacked,
// and FaceSpheres::Kind.
void narrow_band_spheres(const double* triangles, int n, int size, double band, double* spheres, int32_t* kind) {
  int32_t faces[3 * FaceSpheres::kFaces];
  for (int i = 0; i < 3 * n; ++i) faces[i] = i;
  const Mesh<double, int32_t> mesh{triangles, faces, 3 * n, n};
  FaceSpheres out;
  measure_spheres<double, int32_t>({mesh, {{0, 0, 0}, 1, {size, size, size}, band}, 4, 0, n, &out});
  const float corner[3] = {0, 0, 0};
  for (int i = 0; i < n; ++i) {
    const uint32_t packed[kF] = {out.packed[i]};
    const Sphere s = unpack(packed, corner);
    const float within[3] = {s.x[0], s.y[0], s.z[0]};
    for (int k = 0; k < 3; ++k) spheres[4 * i + k] = double{kBlock} * out.cell[k][i] + within[k];
    spheres[4 * i + 3] = s.r[0];
    kind[i] = out.kind[i];
  }
}

}  // namespace cvc::narrow_band
