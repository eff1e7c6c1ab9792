// Neighbour maps as a pipeline over an executor: CUDA on a GPU, plain loops in the tests (common/exec.h).
#pragma once

#include "sparse_conv/geometry.h"
#include "voxels/pipeline.h"

namespace cvc::sparse_conv {

// The Kz neighbours of one output voxel under (kx, ky): one search, then the sorted keys in order.
CVC_HD inline void find_column(const voxels::SortedKeys& in, const Geometry& g, const int32_t* out, int64_t kx,
                               int64_t ky, int32_t* found) {
  const int64_t kernel_z = g.axis[2].kernel;
  for (int64_t k = 0; k < kernel_z; ++k) found[k] = -1;
  const int64_t x = g.axis[0].source(out[1], kx, g.transposed), y = g.axis[1].source(out[2], ky, g.transposed);
  if (x < 0 || y < 0 || !voxels::is_voxel(out)) return;
  const uint64_t base = make_key(out[0], x, y, 0);
  int64_t at = -1;
  // Ascending z: with the offset, transposed against it.
  for (int64_t i = 0; i < kernel_z; ++i) {
    const int64_t k = g.transposed ? kernel_z - 1 - i : i, z = g.axis[2].source(out[3], k, g.transposed);
    if (z < 0) continue;
    const uint64_t key = base + static_cast<uint64_t>(z);
    if (at < 0) at = voxels::detail::first_not_less(in, key);
    while (at < in.size && in.keys[at] < key) ++at;
    if (at < in.size && in.keys[at] == key) found[k] = static_cast<int32_t>(in.rows[at]);
  }
}

// map[o, k] = the row of the input voxel, of equal ones the lowest; nothing is read back.
template <class Exec>
void find_neighbors(Exec& exec, const int32_t* coords, int64_t n, const int32_t* out, int64_t rows, Geometry g,
                    int32_t* map) {
  const voxels::SortedKeys in = voxels::detail::sort_voxels(exec, coords, n);
  const int64_t kernel_y = g.axis[1].kernel, columns = g.axis[0].kernel * kernel_y;
  exec.for_each(rows * columns, [=] CVC_HD(int64_t i) {
    const int64_t o = i / columns, column = i % columns;
    find_column(in, g, out + 4 * o, column / kernel_y, column % kernel_y, map + i * g.axis[2].kernel);
  });
}

}  // namespace cvc::sparse_conv
