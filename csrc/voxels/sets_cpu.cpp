// Intersection and difference of voxels on the CPU. Sets in order are walked together; others become bits of the box
// that they fill, or, where that box is large, are sorted.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "voxels/merge.h"
#include "voxels/rows_by_range.h"
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

// The rows of a range that are chosen, by the rank of their voxel; of equal ones the lowest.
void find_rows(const RowsByRange<true>& rows, int64_t range, const Bits& chosen, int64_t count, uint32_t* row_of,
               uint32_t* cells) {
  std::fill_n(row_of, count, ~uint32_t{0});
  uint32_t no_row = 0, no_cell = 0;
  rows(range, [=, &no_row, &no_cell](int64_t cell, int64_t row) {
    const bool there = chosen.has(cell);
    const int64_t rank = chosen.rank(cell);
    uint32_t& known = there ? row_of[rank] : no_row;  // half of the branches would be guessed wrong
    known = min(known, static_cast<uint32_t>(row));
    if (cells) (there ? cells[rank] : no_cell) = static_cast<uint32_t>(cell);
  });
}

// The same by bits.
std::tuple<Tensor, Tensor, Tensor> select_in_box(const Tensor& a, const Tensor& b, const Rows& given, const Box& box,
                                                 bool in_b, bool assume_unique, int64_t& faults) {
  const Ranges ranges(box, given.size);
  const RowsByRange<true> x(coords_of(a), a.size(0), given.scan[0].ascending, box, ranges, 0, given.short_keys_of(0));
  const RowsByRange<true> y(coords_of(b), b.size(0), given.scan[1].ascending, box, ranges, 0, given.short_keys_of(1));
  // What is found, each range's from first_row on, which leaves room enough.
  std::vector<int64_t> first_row(ranges.count, 0), first_id(ranges.count, 0);
  for (int64_t range = 0; range < ranges.count; ++range) first_row[range] = x.size(range);
  running_sums(first_row);
  Buffer<uint32_t> cells(a.size(0)), row_x(a.size(0)), row_y(in_b ? a.size(0) : 0);
  std::atomic<int64_t> repeated{0};
  struct Space {
    BitSpace x, y, chosen;
  };
  for_each_task(
      ranges.count, [&] { return Space{BitSpace(ranges), BitSpace(ranges), BitSpace(ranges)}; },
      [&](int64_t range, const Space& space) {
        const auto mark = [&](const RowsByRange<true>& rows, const BitSpace& own, bool distinct, Fault fault) {
          const Bits bits = own.bits;
          int64_t count = 0;
          bits.clear();
          rows(range, [bits, &count](int64_t cell, int64_t) {
            bits.set(cell);
            ++count;
          });
          if (distinct && bits.number() < count) repeated.fetch_or(fault, std::memory_order_relaxed);
        };
        mark(x, space.x, !assume_unique, kDuplicate);
        mark(y, space.y, in_b && !assume_unique, kDuplicateSecond);
        const uint64_t turn = in_b ? 0 : ~uint64_t{0};
        for (int64_t w = 0; w < space.chosen.words.size(); ++w)
          space.chosen.words[w] = space.x.words[w] & (space.y.words[w] ^ turn);
        const int64_t from = first_row[range], count = first_id[range] = space.chosen.bits.number();
        find_rows(x, range, space.chosen.bits, count, row_x.data() + from, cells.data() + from);
        if (in_b) find_rows(y, range, space.chosen.bits, count, row_y.data() + from, nullptr);
      });
  faults |= repeated.load();
  if (faults) return {new_coords(a, 0), new_rows(a, 0), new_rows(a, 0)};
  const std::vector<int64_t> chosen = first_id;
  const int64_t total = running_sums(first_id);
  Tensor coords = new_coords(a, total), index_a = new_rows(a, total), index_b = new_rows(a, in_b ? total : 0);
  const auto widen = CVC_ISA_PICK(cell_kernels)()->widen;
  for_each_task(ranges.count, [&](int64_t range) {
    const int64_t from = first_row[range], to = first_id[range], count = chosen[range];
    box.write(ranges.first_cell(range), cells.data() + from, count, data_of<int32_t>(coords) + 4 * to);
    widen(row_x.data() + from, count, data_of<int64_t>(index_a) + to);
    if (in_b) widen(row_y.data() + from, count, data_of<int64_t>(index_b) + to);
  });
  return {coords, index_a, index_b};
}

// The same by a walk, after what is not in order was sorted.
std::tuple<Tensor, Tensor, Tensor> select_in_tables(const Tensor& a, Rows& rows, bool in_b, bool assume_unique,
                                                    int64_t& faults) {
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

// Faults other than rows out of range are left in `faults`.
std::tuple<Tensor, Tensor, Tensor> select(const Tensor& a, const Tensor& b, bool in_b, bool assume_unique,
                                          int64_t& faults) {
  Rows rows(a, b, starts_in_order(a) && starts_in_order(b));  // bits need no keys
  faults = rows.faults();
  if (faults) return {new_coords(a, 0), new_rows(a, 0), new_rows(a, 0)};
  const Scan both = rows.scan[0] + rows.scan[1];
  if (const Box box(both); !both.ascending && box.suits(rows.size))
    return select_in_box(a, b, rows, box, in_b, assume_unique, faults);
  if (rows.keys.size() == 0) rows = Rows(a, b);
  return select_in_tables(a, rows, in_b, assume_unique, faults);
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
