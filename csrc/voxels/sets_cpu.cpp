// Set algebra of voxels on the CPU: one pass over what is given, then bits of the box that it fills, or, where that box
// is large, a sort of what is not in order, and merges.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "voxels/cells.h"
#include "voxels/lookup.h"

namespace cvc::voxels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int32_t* coords_of(const Tensor& coords) { return static_cast<const int32_t*>(coords.const_data_ptr()); }

Tensor new_coords(const Tensor& like, int64_t n) { return new_tensor(like, {n, 4}, ScalarType::Int); }
Tensor new_rows(const Tensor& like, int64_t n) { return new_tensor(like, {n}, ScalarType::Long); }

// --- unique and union ------------------------------------------------------------------------------------------------

// Where the rows of one or two sets, one after the other, are to be told the row of their voxel.
struct Inverse {
  int64_t *a, *b;  // b as if it went on from a
  int64_t first;
  int64_t& operator[](int64_t row) const { return (row < first ? a : b)[row]; }
};

struct Distinct {
  Tensor coords, counts, first;
};

Distinct new_distinct(const Tensor& like, int64_t n, bool details) {
  return {new_coords(like, n), new_rows(like, details ? n : 0), new_rows(like, details ? n : 0)};
}

// The distinct voxels of one sorted table.
template <class Table>
Distinct distinct_of(const Tensor& like, const Table& table, const Inverse& inverse, bool details) {
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
          inverse[row] = id;
          if (details) {
            first[id] = fresh ? row : first[id];
            counts[id] = i - head + 1;
          }
        }
      });
  return out;
}

// The distinct voxels of two sorted tables. The tables are walked together once, which numbers the voxels within their
// chunk; the rest goes through each table by itself, in order, with nothing to decide.
template <class Table>
Distinct distinct_of(const Tensor& like, const Table& a, const Table& b, const Inverse& inverse, bool details) {
  const std::vector<Cut> cuts = cut(a, b);
  int64_t *const index_a = inverse.a, *const index_b = inverse.b + inverse.first;
  Distinct out;
  count_then_write(
      static_cast<int64_t>(cuts.size()) - 1,
      [&](int64_t c) {
        int64_t id = -1;
        walk_both(a, b, cuts[c].i, cuts[c + 1].i, cuts[c].j, cuts[c + 1].j,
                  [&](bool fresh, int64_t i, int64_t j, auto has_a, auto has_b) {
                    id += fresh;
                    if constexpr (has_a) index_a[a.row(i)] = id;
                    if constexpr (has_b) index_b[b.row(j)] = id;
                  });
        return id + 1;
      },
      [&](int64_t total) { out = new_distinct(like, total, details); },
      [&](int64_t c, int64_t begin, int64_t end) {
        int32_t* const coords = data_of<int32_t>(out.coords);
        int64_t *const counts = data_of<int64_t>(out.counts), *const first = data_of<int64_t>(out.first);
        if (details) std::fill(counts + begin, counts + end, 0);
        // Backwards, the second table first: the lowest row of each voxel is the last to be written.
        const auto write = [&](const Table& table, int64_t from, int64_t to, int64_t* index, int64_t offset) {
          for (int64_t i = to - 1; i >= from; --i) {
            const int64_t row = table.row(i), id = index[row] += begin;
            write_voxel(table.widen(table.key(i)), coords + 4 * id);
            if (details) {
              first[id] = offset + row;
              ++counts[id];
            }
          }
        };
        write(b, cuts[c].j, cuts[c + 1].j, index_b, inverse.first);
        write(a, cuts[c].i, cuts[c + 1].i, index_a, 0);
      });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t> voxel_unique(Tensor coords) {
  Rows rows(coords);
  if (rows.faults())
    return {new_coords(coords, 0), new_rows(coords, 0), new_rows(coords, 0), new_rows(coords, 0), rows.faults()};
  Tensor index = new_rows(coords, rows.size);
  int64_t* const to = data_of<int64_t>(index);
  const Scan& scan = rows.scan[0];
  Distinct found;
  if (scan.descents == 1) {  // two sets in order, one after the other
    const Inverse inverse{to, to, scan.descent};
    found =
        with_tables(rows.keys, Layout(scan), {{0, scan.descent, true}, {scan.descent, rows.size - scan.descent, true}},
                    [&](const auto& a, const auto& b) { return distinct_of(coords, a, b, inverse, true); });
  } else {
    const Inverse inverse{to, to, rows.size};
    found = with_tables(rows.keys, Layout(scan), {{0, rows.size, scan.ascending}},
                        [&](const auto& table) { return distinct_of(coords, table, inverse, true); });
  }
  return {found.coords, index, found.counts, found.first, 0};
}

std::tuple<Tensor, Tensor, Tensor, int64_t> voxel_union(Tensor a, Tensor b) {
  Rows rows(a, b);
  if (rows.faults()) return {new_coords(a, 0), new_rows(a, 0), new_rows(a, 0), rows.faults()};
  Tensor index_a = new_rows(a, rows.first), index_b = new_rows(a, rows.size - rows.first);
  const Inverse inverse{data_of<int64_t>(index_a), data_of<int64_t>(index_b) - rows.first, rows.first};
  const Scan both = rows.scan[0] + rows.scan[1];
  Distinct found;
  if (rows.scan[0].ascending || rows.scan[1].ascending) {
    found = with_tables(
        rows.keys, Layout(both),
        {{0, rows.first, rows.scan[0].ascending}, {rows.first, rows.size - rows.first, rows.scan[1].ascending}},
        [&](const auto& x, const auto& y) { return distinct_of(a, x, y, inverse, false); });
  } else {  // sorting them together saves the merge
    found = with_tables(rows.keys, Layout(both), {{0, rows.size, false}},
                        [&](const auto& table) { return distinct_of(a, table, inverse, false); });
  }
  return {found.coords, index_a, index_b, 0};
}

// --- intersection and difference -------------------------------------------------------------------------------------

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

// --- membership and lookup -------------------------------------------------------------------------------------------

// Whether bits suit look-ups of so many queries: of few in many, a search needs to see little of the table.
bool suits_queries(const Box& box, int64_t table, int64_t queries) {
  return queries > table / 16 && box.suits(table + queries);
}

std::tuple<Tensor, int64_t> voxel_isin(Tensor a, Tensor b) {
  const int64_t na = a.size(0), nb = b.size(0);
  const Scan scan = scan_all(coords_of(b), nb, nullptr);
  Tensor found = new_tensor(a, {na}, ScalarType::Bool);
  if (!scan.in_range) return {found, kOutOfRangeSecond};
  bool* const out = data_of<bool>(found);
  const Box box(scan);
  if (nb > 0 && suits_queries(box, nb, na)) {
    const Ranges ranges(box, na + nb);
    const RowsByRange<> table(coords_of(b), nb, scan.ascending, box, ranges);
    const RowsByRange queries(coords_of(a), na, in_order(coords_of(a), na), box, ranges,
                              [=](int64_t row) { out[row] = false; });
    for_each_task(
        ranges.count, [&] { return Bits(ranges); },
        [&](int64_t range, Bits& bits) {
          bits.start(range);
          table(range, [&](uint64_t cell, int64_t) { bits.set(cell); });
          queries(range, [&](uint64_t cell, int64_t row) { out[row] = bits.has(cell); });
        });
    return {found, 0};
  }
  Rows rows(b);
  with_tables(rows.keys, Layout(rows.scan[0]), {{0, rows.size, rows.scan[0].ascending}}, [&](const auto& table) {
    look_up(table, rows.scan[0], coords_of(a), a.size(0), [&](int64_t i, int64_t place) { out[i] = place >= 0; });
  });
  return {found, 0};
}

// Looks up every query in the bits of a table; returns the faults.
int64_t look_up(const Box& box, const Tensor& coords, const Scan& scan, const Tensor& query, bool assume_unique,
                int64_t* out) {
  const int64_t n = coords.size(0), m = query.size(0);
  const Ranges ranges(box, n + m);
  const RowsByRange<> table(coords_of(coords), n, scan.ascending, box, ranges);
  const RowsByRange queries(coords_of(query), m, in_order(coords_of(query), m), box, ranges,
                            [=](int64_t row) { out[row] = -1; });
  const bool numbered = scan.ascending && scan.distinct;  // the rank of a voxel is its row
  std::atomic<bool> repeated{false};
  const auto make = [&] { return std::make_pair(Bits(ranges), std::vector<uint32_t>()); };
  for_each_task(ranges.count, make, [&](int64_t range, auto& scratch) {
    Bits& bits = scratch.first;
    std::vector<uint32_t>& row_of = scratch.second;
    bits.start(range);
    int64_t rows = 0;
    table(range, [&](uint64_t cell, int64_t) {
      bits.set(cell);
      ++rows;
    });
    const int64_t size = bits.number();
    if (numbered) {
      const int64_t first = table.first_row(range);
      queries(range, [&](uint64_t cell, int64_t row) { out[row] = bits.has(cell) ? first + bits.rank(cell) : -1; });
      return;
    }
    if (size < rows) repeated.store(true, std::memory_order_relaxed);
    row_of.resize(max(row_of.size(), static_cast<size_t>(size) + 1));  // one more: the rank of an absent voxel
    table(range, [&](uint64_t cell, int64_t row) { row_of[bits.rank(cell)] = static_cast<uint32_t>(row); });
    queries(range, [&](uint64_t cell, int64_t row) {
      const int64_t there = row_of[bits.rank(cell)];
      out[row] = bits.has(cell) ? there : -1;
    });
  });
  return (repeated.load() && !assume_unique) * kDuplicate;
}

std::tuple<Tensor, int64_t> voxel_lookup(Tensor coords, Tensor query, bool assume_unique) {
  const Scan scan = scan_all(coords_of(coords), coords.size(0), nullptr);
  Tensor found = new_rows(query, query.size(0));
  if (!scan.in_range) return {found, kOutOfRange};
  int64_t* const out = data_of<int64_t>(found);
  const Box box(scan);
  if (coords.size(0) > 0 && suits_queries(box, coords.size(0), query.size(0)))
    return {found, look_up(box, coords, scan, query, assume_unique, out)};
  Rows rows(coords);
  int64_t faults = 0;
  with_tables(rows.keys, Layout(rows.scan[0]), {{0, rows.size, rows.scan[0].ascending}}, [&](const auto& table) {
    if (!assume_unique && has_duplicates(table)) {
      faults = kDuplicate;
      return;
    }
    look_up(table, rows.scan[0], coords_of(query), query.size(0),
            [&](int64_t i, int64_t place) { out[i] = place < 0 ? -1 : table.row(place); });
  });
  return {found, faults};
}

// Sets how many words of bits there may be for every row; returns what it was. For tests.
int64_t voxel_words_per_row(int64_t most) { return words_per_row.exchange(most); }

}  // namespace
}  // namespace cvc::voxels

// Coordinates are contiguous int32: Python sees to it. The last result tells the faults found (voxels/keys.h).
STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def("voxel_unique(Tensor coords) -> (Tensor, Tensor, Tensor, Tensor, int)");
  m.def("voxel_union(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor, int)");
  m.def("voxel_intersection(Tensor a, Tensor b, bool assume_unique) -> (Tensor, Tensor, Tensor, int)");
  m.def("voxel_difference(Tensor a, Tensor b, bool assume_unique) -> (Tensor, Tensor, int)");
  m.def("voxel_isin(Tensor a, Tensor b) -> (Tensor, int)");
  m.def("voxel_words_per_row(int most) -> int");
  m.def("voxel_lookup(Tensor coords, Tensor query, bool assume_unique) -> (Tensor, int)");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("voxel_unique", TORCH_BOX(&cvc::voxels::voxel_unique));
  m.impl("voxel_union", TORCH_BOX(&cvc::voxels::voxel_union));
  m.impl("voxel_intersection", TORCH_BOX(&cvc::voxels::voxel_intersection));
  m.impl("voxel_difference", TORCH_BOX(&cvc::voxels::voxel_difference));
  m.impl("voxel_isin", TORCH_BOX(&cvc::voxels::voxel_isin));
  m.impl("voxel_lookup", TORCH_BOX(&cvc::voxels::voxel_lookup));
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CompositeExplicitAutograd, m) {
  m.impl("voxel_words_per_row", TORCH_BOX(&cvc::voxels::voxel_words_per_row));
}
