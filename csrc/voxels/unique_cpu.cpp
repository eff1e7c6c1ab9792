// The distinct voxels of one set or two: sets in order are merged, others become bits of the box that they fill, or,
// where that box is large, are sorted.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <type_traits>

#include "common/isa.h"
#include "voxels/rows_by_range.h"
#include "voxels/steps.h"
#include "voxels/tensors.h"

namespace cvc::voxels {
namespace {

using torch::stable::Tensor;

// Rows to be told the row of their voxel in `index`.
struct Given {
  const int32_t* coords;
  int64_t begin, size;  // where their keys are
  bool ascending;
  int64_t* index;
  const uint32_t* short_keys;  // or null
};

struct Distinct {
  Tensor coords, counts, first;
};

Distinct new_distinct(const Tensor& like, int64_t n, bool details) {
  return {new_coords(like, n), new_rows(like, details ? n : 0), new_rows(like, details ? n : 0)};
}

// --- by a merge ------------------------------------------------------------------------------------------------------

// Of two sets in order; `repeats` tells whether either may repeat voxels.
Distinct merged(const Tensor& like, const uint64_t* keys, const Given& a, const Given& b, bool repeats, bool details) {
  const Plain table_a{keys + a.begin, a.size}, table_b{keys + b.begin, b.size};
  const std::vector<Cut> cuts = cut(table_a, table_b);
  const int64_t parts = static_cast<int64_t>(cuts.size()) - 1;
  Buffer<uint8_t> steps(a.size + b.size);
  std::vector<int64_t> first_id(parts + 1, 0);
  const auto first_step = [&](int64_t p) { return steps.data() + cuts[p].i + cuts[p].j; };
  const auto find_steps = [&](auto with_repeats) {
    for_each_task((parts + 1) / 2, [&](int64_t t) {
      Merge<decltype(with_repeats)::value> merges[2] = {};
      const int64_t first = 2 * t, count = min<int64_t>(2, parts - first);
      for (int64_t k = 0; k < count; ++k) {
        const Cut &begin = cuts[first + k], &end = cuts[first + k + 1];
        merges[k] = {table_a.keys + begin.i, table_a.keys + end.i, table_b.keys + begin.j, table_b.keys + end.j,
                     first_step(first + k)};
      }
      finish_both(merges[0], merges[1]);
      for (int64_t k = 0; k < count; ++k) first_id[first + k] = count_fresh(first_step(first + k), merges[k].steps);
    });
  };
  if (repeats) {
    find_steps(std::true_type());
  } else {
    find_steps(std::false_type());
  }
  Distinct out = new_distinct(like, running_sums(first_id), details);
  const Merged merged{table_a.keys,
                      table_b.keys,
                      a.index,
                      b.index,
                      b.begin - a.begin,
                      data_of<int32_t>(out.coords),
                      details ? data_of<int64_t>(out.counts) : nullptr,
                      details ? data_of<int64_t>(out.first) : nullptr};
  const auto write_steps = CVC_ISA_PICK(write_steps);
  for_each_task(parts, [&](int64_t p) {
    write_steps(&merged, {first_step(p), cuts[p].i, cuts[p + 1].i, cuts[p].j, cuts[p + 1].j, first_id[p] - 1});
  });
  return out;
}

// --- by bits ---------------------------------------------------------------------------------------------------------

// Details are those of the only set.
Distinct in_box(const Tensor& like, const Box& box, const std::vector<Given>& sets, bool details) {
  int64_t n = 0;
  for (const Given& set : sets) n += set.size;
  const Ranges ranges(box, n);
  std::vector<RowsByRange<true>> rows;
  for (const Given& set : sets)
    rows.emplace_back(set.coords, set.size, set.ascending, box, ranges, /*absent=*/0, set.short_keys);

  // What is found of the voxels, each range's from first_row on, which leaves room enough.
  std::vector<int64_t> first_row(ranges.count, 0), first_id(ranges.count, 0);
  for (int64_t range = 0; range < ranges.count; ++range)
    for (const RowsByRange<true>& set : rows) first_row[range] += set.size(range);
  running_sums(first_row);
  Buffer<uint32_t> cells(n), lowest(details ? n : 0), times(details ? n : 0);
  for_each_task(
      ranges.count, [&] { return BitSpace(ranges); },
      [&](int64_t range, const BitSpace& space) {
        const Bits bits = space.bits;
        bits.clear();
        for (const RowsByRange<true>& set : rows) set(range, [bits](int64_t cell, int64_t) { bits.set(cell); });
        first_id[range] = bits.number();
        uint32_t* const own = cells.data() + first_row[range];
        fetch_to_write(own, first_id[range]);
        if (details) {
          uint32_t *const row_of = lowest.data() + first_row[range], *const count = times.data() + first_row[range];
          std::fill_n(count, first_id[range], 0);
          rows[0].answer_backwards(range, sets[0].index, [=](int64_t cell, int64_t row) {
            const int64_t rank = bits.rank(cell);
            own[rank] = static_cast<uint32_t>(cell);
            row_of[rank] = static_cast<uint32_t>(row);
            ++count[rank];
            return rank;
          });
          return;
        }
        for (size_t k = 0; k < sets.size(); ++k)
          rows[k].answer(range, sets[k].index, [bits, own](int64_t cell, int64_t) {
            const int64_t rank = bits.rank(cell);
            own[rank] = static_cast<uint32_t>(cell);
            return rank;
          });
      });
  const std::vector<int64_t> distinct = first_id;
  Distinct out = new_distinct(like, running_sums(first_id), details);
  int32_t* const coords = data_of<int32_t>(out.coords);
  int64_t *const counts = data_of<int64_t>(out.counts), *const first = data_of<int64_t>(out.first);
  const auto widen = CVC_ISA_PICK(cell_kernels)()->widen;
  for_each_task(ranges.count, [&](int64_t range) {
    const int64_t from = first_row[range], to = first_id[range];
    box.write(ranges.first_cell(range), cells.data() + from, distinct[range], coords + 4 * to);
    if (!details) return;
    widen(lowest.data() + from, distinct[range], first + to);
    widen(times.data() + from, distinct[range], counts + to);
  });
  for (size_t k = 0; k < sets.size(); ++k) rows[k].deliver(sets[k].index, first_id);
  return out;
}

// --- by a sort -------------------------------------------------------------------------------------------------------

// Of one sorted table; inverse(row) is where the row is to be told its voxel.
template <class Table, class Inverse>
Distinct of_table(const Tensor& like, const Table& table, const Inverse& inverse, bool details) {
  const std::vector<int64_t> begin = cut(table);
  Distinct out;
  count_then_write(
      static_cast<int64_t>(begin.size()) - 1,
      [&](int64_t c) {
        int64_t heads = 0;
        for (int64_t i = begin[c]; i < begin[c + 1]; ++i) heads += i == 0 || table.key(i) != table.key(i - 1);
        return heads;
      },
      [&](int64_t total) { out = new_distinct(like, total, details); },
      [&](int64_t c, int64_t id, int64_t) {
        int32_t* const coords = data_of<int32_t>(out.coords);
        int64_t *const counts = data_of<int64_t>(out.counts), *const first = data_of<int64_t>(out.first);
        uint64_t before = kNoKey;
        --id;
        int64_t head = 0;
        for (int64_t i = begin[c]; i < begin[c + 1]; ++i) {
          const uint64_t key = table.key(i);
          const bool fresh = key != before;
          id += fresh;
          head = fresh ? i : head;
          before = key;
          write_voxel(table.widen(key), coords + 4 * id);
          const int64_t row = table.row(i);
          inverse(row) = id;
          if (details) {
            first[id] = fresh ? row : first[id];
            counts[id] = i - head + 1;
          }
        }
      });
  return out;
}

// --- the operators ---------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t> voxel_unique(Tensor coords) {
  Rows rows(coords, starts_in_order(coords));  // bits need no keys
  if (rows.faults())
    return {new_coords(coords, 0), new_rows(coords, 0), new_rows(coords, 0), new_rows(coords, 0), rows.faults()};
  Tensor index = new_rows(coords, rows.size);
  const int32_t* const from = coords_of(coords);
  int64_t* const to = data_of<int64_t>(index);
  const Scan scan = rows.scan[0];
  const Box box(scan);
  const bool two_runs = scan.descents == 1;  // two sets in order, one after the other
  Distinct found;
  if (!scan.ascending && !two_runs && box.suits(rows.size)) {
    found = in_box(coords, box, {{from, 0, rows.size, false, to, rows.short_keys_of(0)}}, true);
    return {found.coords, index, found.counts, found.first, 0};
  }
  if (rows.keys.size() == 0) rows = Rows(coords);
  if (two_runs) {
    const int64_t half = scan.descent;
    found = merged(coords, rows.keys.data(), {from, 0, half, true, to, nullptr},
                   {from + 4 * half, half, rows.size - half, true, to + half, nullptr}, !scan.distinct, true);
  } else {
    found = with_tables(rows.keys, Layout(scan), {{0, rows.size, scan.ascending}}, [&](const auto& table) {
      return of_table(coords, table, [=](int64_t row) -> int64_t& { return to[row]; }, true);
    });
  }
  return {found.coords, index, found.counts, found.first, 0};
}

std::tuple<Tensor, Tensor, Tensor, int64_t> voxel_union(Tensor a, Tensor b) {
  Rows rows(a, b, starts_in_order(a) && starts_in_order(b));
  if (rows.faults()) return {new_coords(a, 0), new_rows(a, 0), new_rows(a, 0), rows.faults()};
  const int64_t size_a = rows.first, size_b = rows.size - rows.first;
  Tensor index_a = new_rows(a, size_a), index_b = new_rows(a, size_b);
  const Given set_a{coords_of(a), 0, size_a, rows.scan[0].ascending, data_of<int64_t>(index_a), rows.short_keys_of(0)};
  const Given set_b{coords_of(b),         size_a, size_b, rows.scan[1].ascending, data_of<int64_t>(index_b),
                    rows.short_keys_of(1)};
  const Scan both = rows.scan[0] + rows.scan[1];
  const Box box(both);
  Distinct found;
  if (set_a.ascending && set_b.ascending) {
    found = merged(a, rows.keys.data(), set_a, set_b, !both.distinct, false);
  } else if (box.suits(rows.size)) {
    found = in_box(a, box, {set_a, set_b}, false);
  } else {
    if (rows.keys.size() == 0) rows = Rows(a, b);
    found = with_tables(rows.keys, Layout(both), {{0, rows.size, false}}, [&](const auto& table) {
      const auto inverse = [&](int64_t row) -> int64_t& {
        return row < size_a ? set_a.index[row] : set_b.index[row - size_a];
      };
      return of_table(a, table, inverse, false);
    });
  }
  return {found.coords, index_a, index_b, 0};
}

}  // namespace
}  // namespace cvc::voxels

// Coordinates are contiguous int32: Python sees to it. The last result tells the faults found (voxels/keys.h).
STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def("voxel_unique(Tensor coords) -> (Tensor, Tensor, Tensor, Tensor, int)");
  m.def("voxel_union(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor, int)");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("voxel_unique", TORCH_BOX(&cvc::voxels::voxel_unique));
  m.impl("voxel_union", TORCH_BOX(&cvc::voxels::voxel_union));
}
