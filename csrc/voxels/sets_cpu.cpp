// Intersection and difference of voxels on the CPU: what is not in order is sorted, then both are walked together.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "voxels/merge.h"
#include "voxels/tensors.h"

namespace cvc::voxels {
namespace {

using torch::stable::Tensor;

// The voxels of a that are in b, or that are not, and their rows.
template <class Table>
std::tuple<Tensor, Tensor, Tensor> select(const Tensor& like, const Table& a, const Table& b, bool in_b) {
  const std::vector<Cut> begin = cut(a, b);
  const auto walk = [&](int64_t c, const auto& visit) {
    walk_first(a, b, begin[c].i, begin[c + 1].i, begin[c].j, begin[c + 1].j, visit);
  };
  Tensor coords, index_a, index_b;
  count_then_write(
      static_cast<int64_t>(begin.size()) - 1,
      [&](int64_t c) {
        int64_t total = 0;
        walk(c, [&](uint64_t, int64_t, int64_t j) { total += (j >= 0) == in_b; });
        return total;
      },
      [&](int64_t total) {
        coords = new_coords(like, total);
        index_a = new_rows(like, total);
        index_b = new_rows(like, in_b ? total : 0);
      },
      [&](int64_t c, int64_t id, int64_t) {
        int32_t* const voxel = data_of<int32_t>(coords);
        int64_t *const row_a = data_of<int64_t>(index_a), *const row_b = data_of<int64_t>(index_b);
        walk(c, [&](uint64_t key, int64_t i, int64_t j) {
          if ((j >= 0) != in_b) return;
          write_voxel(a.widen(key), voxel + 4 * id);
          row_a[id] = a.row(i);
          if (in_b) row_b[id] = b.row(j);
          ++id;
        });
      });
  return {coords, index_a, index_b};
}

// Faults other than rows out of range are left in `faults`.
std::tuple<Tensor, Tensor, Tensor> select(const Tensor& a, const Tensor& b, bool in_b, bool assume_unique,
                                          int64_t& faults) {
  Rows rows(a, b);
  faults = rows.faults();
  if (faults) return {new_coords(a, 0), new_rows(a, 0), new_rows(a, 0)};
  return with_tables(
      rows.keys, Layout(rows.scan[0] + rows.scan[1]),
      {{0, rows.first, rows.scan[0].ascending}, {rows.first, rows.size - rows.first, rows.scan[1].ascending}},
      [&](const auto& x, const auto& y) -> std::tuple<Tensor, Tensor, Tensor> {
        if (!assume_unique) {
          if (has_duplicates(x)) faults |= kDuplicate;
          if (in_b && has_duplicates(y)) faults |= kDuplicateSecond;
          if (faults) return {new_coords(a, 0), new_rows(a, 0), new_rows(a, 0)};
        }
        if (in_b && x.size > y.size) {  // the smaller set leads
          auto [coords, index_y, index_x] = select(a, y, x, in_b);
          return {coords, index_x, index_y};
        }
        return select(a, x, y, in_b);
      });
}

std::tuple<Tensor, Tensor, Tensor, int64_t> voxel_intersection(Tensor a, Tensor b, bool assume_unique) {
  int64_t faults = 0;
  auto [coords, index_a, index_b] = select(a, b, true, assume_unique, faults);
  return {coords, index_a, index_b, faults};
}

std::tuple<Tensor, Tensor, int64_t> voxel_difference(Tensor a, Tensor b, bool assume_unique) {
  int64_t faults = 0;
  auto [coords, index_a, index_b] = select(a, b, false, assume_unique, faults);
  return {coords, index_a, faults};
}

}  // namespace
}  // namespace cvc::voxels

// Coordinates are contiguous int32: Python sees to it. The last result tells the faults found (voxels/keys.h).
STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def("voxel_intersection(Tensor a, Tensor b, bool assume_unique) -> (Tensor, Tensor, Tensor, int)");
  m.def("voxel_difference(Tensor a, Tensor b, bool assume_unique) -> (Tensor, Tensor, int)");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("voxel_intersection", TORCH_BOX(&cvc::voxels::voxel_intersection));
  m.impl("voxel_difference", TORCH_BOX(&cvc::voxels::voxel_difference));
}
