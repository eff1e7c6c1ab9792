// Membership and lookup of voxels on the CPU: by the bits of the box that the table fills, or, where that box is large,
// by a search in the sorted table.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "voxels/lookup.h"
#include "voxels/rows_by_range.h"
#include "voxels/tensors.h"

namespace cvc::voxels {
namespace {

using torch::stable::Tensor;

// Whether bits suit look-ups of so many queries: of few in many, a search needs to see little of the table.
bool suits_queries(const Box& box, int64_t table, int64_t queries) {
  return queries > table / 16 && box.suits(table + queries);
}

std::tuple<Tensor, int64_t> voxel_isin(Tensor a, Tensor b) {
  const int64_t na = a.size(0), nb = b.size(0);
  const Scan scan = scan_all(coords_of(b), nb, nullptr);
  Tensor found = new_tensor(a, {na}, torch::headeronly::ScalarType::Bool);
  if (!scan.in_range) return {found, kOutOfRangeSecond};
  bool* const out = data_of<bool>(found);
  const Box box(scan);
  if (nb > 0 && suits_queries(box, nb, na)) {
    const Ranges ranges(box, na + nb);
    const RowsByRange<true> table(coords_of(b), nb, scan.ascending, box, ranges);
    const RowsByRange<false> queries(coords_of(a), na, in_order(coords_of(a), na), box, ranges, /*absent=*/0);
    for_each_task(
        ranges.count, [&] { return BitSpace(ranges); },
        [&](int64_t range, const BitSpace& space) {
          const Bits bits = space.bits;
          bits.clear();
          table(range, [bits](int64_t cell, int64_t) { bits.set(cell); });
          queries.answer(range, out, [bits](int64_t cell, int64_t) { return bits.has(cell); });
        });
    queries.deliver(out);
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
  const RowsByRange<true> table(coords_of(coords), n, scan.ascending, box, ranges);
  const RowsByRange<false> queries(coords_of(query), m, in_order(coords_of(query), m), box, ranges, /*absent=*/-1);
  const bool numbered = scan.ascending && scan.distinct;  // the rank of a voxel is its row
  std::atomic<bool> repeated{false};
  const auto make = [&] { return std::make_pair(BitSpace(ranges), std::vector<uint32_t>()); };
  for_each_task(ranges.count, make, [&](int64_t range, auto& scratch) {
    const Bits bits = scratch.first.bits;
    bits.clear();
    int64_t rows = 0;
    table(range, [bits, &rows](int64_t cell, int64_t) {
      bits.set(cell);
      ++rows;
    });
    const int64_t size = bits.number();
    if (numbered) {
      const int64_t first = table.first_row(range);
      queries.answer(range, out,
                     [=](int64_t cell, int64_t) { return (first + bits.rank(cell)) | (int64_t{bits.has(cell)} - 1); });
      return;
    }
    if (size < rows) repeated.store(true, std::memory_order_relaxed);
    scratch.second.assign(size + 1, ~uint32_t{0});  // one more: the rank of an absent voxel
    uint32_t* const lowest = scratch.second.data();
    table(range, [=](int64_t cell, int64_t row) {
      uint32_t& there = lowest[bits.rank(cell)];
      there = min(there, static_cast<uint32_t>(row));
    });
    queries.answer(range, out, [=](int64_t cell, int64_t) {
      return lowest[bits.rank(cell)] | (int64_t{bits.has(cell)} - 1);  // half of the branches would be guessed wrong
    });
  });
  queries.deliver(out);
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
  m.def("voxel_isin(Tensor a, Tensor b) -> (Tensor, int)");
  m.def("voxel_lookup(Tensor coords, Tensor query, bool assume_unique) -> (Tensor, int)");
  m.def("voxel_words_per_row(int most) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("voxel_isin", TORCH_BOX(&cvc::voxels::voxel_isin));
  m.impl("voxel_lookup", TORCH_BOX(&cvc::voxels::voxel_lookup));
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CompositeExplicitAutograd, m) {
  m.impl("voxel_words_per_row", TORCH_BOX(&cvc::voxels::voxel_words_per_row));
}
