// Coarser, finer, grown and cut sets of voxels as pipelines over an executor (common/exec.h).
#pragma once

#include "voxels/front.h"
#include "voxels/pipeline.h"

namespace cvc::voxels {

// --- occupancy → coordinates -----------------------------------------------------------------------------------------

struct OccupiedPlan {
  atomic64* bits;  // one per cell
  int64_t* first;  // of each 64 cells: how many are occupied before them
  int64_t words, count;
};

// The volume is read once, cell by cell; few cells are occupied, so few bits are set.
template <class Exec, class Above>
OccupiedPlan plan_occupied(Exec& exec, int64_t cells, Above above) {
  const int64_t words = (cells + 63) / 64;
  OccupiedPlan plan{exec.template alloc<atomic64>(words), exec.template alloc<int64_t>(words + 1), words, 0};
  atomic64* const bits = plan.bits;
  int64_t* const first = plan.first;
  exec.for_each(words, [=] CVC_HD(int64_t w) { bits[w] = 0; });
  exec.for_each(cells, [=] CVC_HD(int64_t i) {
    if (above(i)) atomic_or(bits + i / 64, atomic64{1} << (i % 64));
  });
  exec.for_each(words + 1, [=] CVC_HD(int64_t w) {
    int64_t count = 0;
    for (atomic64 word = w < words ? bits[w] : 0; word != 0; word &= word - 1) ++count;
    first[w] = count;
  });
  exec.exclusive_scan(first, first, words + 1);
  plan.count = exec.read(first + words);
  return plan;
}

template <class Exec>
void emit_occupied(Exec& exec, const OccupiedPlan& plan, int64_t x, int64_t y, int64_t z, int32_t* coords) {
  const atomic64* const bits = plan.bits;
  const int64_t* const first = plan.first;
  exec.for_each(plan.words, [=] CVC_HD(int64_t w) {
    int32_t* row = coords + 4 * first[w];
    for (int k = 0; k < 64; ++k) {
      if ((bits[w] >> k & 1) == 0) continue;
      const int64_t cell = 64 * w + k;
      row[3] = static_cast<int32_t>(cell % z);
      row[2] = static_cast<int32_t>(cell / z % y);
      row[1] = static_cast<int32_t>(cell / z / y % x);
      row[0] = static_cast<int32_t>(cell / z / y / x);
      row += 4;
    }
  });
}

// --- coarsen ---------------------------------------------------------------------------------------------------------

// Distinct parents of voxels; `emit_distinct` then writes them, where every voxel went, and how many did.
template <class Exec>
DistinctPlan plan_coarsen(Exec& exec, const int32_t* coords, int64_t n, int32_t fx, int32_t fy, int32_t fz) {
  return detail::plan_keys(exec, n, [=] CVC_HD(int64_t i, int64_t* fault) {
    const int32_t* const c = coords + 4 * i;
    if (!is_voxel(c)) {
      *fault = kOutOfRange;
      return kNoVoxel;
    }
    const int32_t parent[4] = {c[0], c[1] / fx, c[2] / fy, c[3] / fz};
    return key_of(parent);
  });
}

// --- children --------------------------------------------------------------------------------------------------------

struct ChildrenPlan {
  SortedKeys sorted;  // of the 8 n children, absent ones last
  int64_t count;
  bool fault;
};

// With a mask [n, 8] the number of children is read back, and rows whose children are no voxels are reported; without
// one there are 8 n, and nothing is read.
template <class Exec>
ChildrenPlan plan_children(Exec& exec, const int32_t* coords, int64_t n, const bool* mask) {
  uint64_t* const keys = exec.template alloc<uint64_t>(8 * n);
  exec.for_each(8 * n, [=] CVC_HD(int64_t i) {
    const int32_t* const c = coords + 4 * (i / 8);
    const int child = static_cast<int>(i % 8);
    const bool proper = is_voxel(c) && (c[1] | c[2] | c[3]) < static_cast<int32_t>(kMaxCoord / 2);
    const int32_t fine[4] = {c[0], 2 * c[1] + (child >> 2), 2 * c[2] + (child >> 1 & 1), 2 * c[3] + (child & 1)};
    keys[i] = proper && (mask == nullptr || mask[i]) ? key_of(fine) : kNoVoxel;
  });
  ChildrenPlan plan{detail::sort_keys(exec, keys, 8 * n), 8 * n, false};
  if (mask == nullptr) return plan;
  Found* const found = detail::new_found(exec);
  exec.for_each(8 * n, [=] CVC_HD(int64_t i) {
    const int32_t* const c = coords + 4 * (i / 8);
    if (!is_voxel(c) || (c[1] | c[2] | c[3]) >= static_cast<int32_t>(kMaxCoord / 2))
      atomic_or(&found->faults, atomic64{1});
  });
  const SortedKeys sorted = plan.sorted;
  exec.for_each(1, [=] CVC_HD(int64_t) { found->count = detail::first_not_less(sorted, kNoVoxel); });
  const Found read = exec.read(found);
  plan.count = read.count;
  plan.fault = read.faults != 0;
  return plan;
}

template <class Exec>
void emit_children(Exec& exec, const ChildrenPlan& plan, const int32_t* coords, int32_t* fine, int64_t* parent) {
  const SortedKeys sorted = plan.sorted;
  exec.for_each(plan.count, [=] CVC_HD(int64_t i) {
    const int64_t row = sorted.rows[i] / 8;
    const int child = static_cast<int>(sorted.rows[i] % 8);
    const int32_t* const c = coords + 4 * row;
    const int32_t place[4] = {c[0], 2 * c[1] + (child >> 2), 2 * c[2] + (child >> 1 & 1), 2 * c[3] + (child & 1)};
    for (int k = 0; k < 4; ++k) fine[4 * i + k] = place[k];
    parent[i] = row;
  });
}

// --- dilation --------------------------------------------------------------------------------------------------------

struct DilatePlan {
  SortedKeys sorted;
  int64_t* first;
  Found found;
};

// Every voxel names its neighbours under the kernel; those within the grid are sorted, and of equal ones the first is
// taken.
template <class Exec>
DilatePlan plan_dilate(Exec& exec, const int32_t* coords, int64_t n, const bool* kernel, Vec3<int32_t> size,
                       Vec3<int32_t> shape) {
  const int64_t cells = int64_t{size.x} * size.y * size.z;
  uint64_t* const keys = exec.template alloc<uint64_t>(n * cells);
  Found* const found = detail::new_found(exec);
  exec.for_each(n * cells, [=] CVC_HD(int64_t i) {
    const int32_t* const c = coords + 4 * (i / cells);
    const int32_t cell = static_cast<int32_t>(i % cells);
    keys[i] = kNoVoxel;
    if (!is_voxel(c)) {
      atomic_or(&found->faults, static_cast<atomic64>(kOutOfRange));
    } else if (kernel[cell]) {
      const int32_t x = c[1] + cell / (size.y * size.z) - size.x / 2, y = c[2] + cell / size.z % size.y - size.y / 2;
      const int32_t z = c[3] + cell % size.z - size.z / 2;
      const int32_t near[4] = {c[0], x, y, z};
      if (x >= 0 && x < shape.x && y >= 0 && y < shape.y && z >= 0 && z < shape.z) keys[i] = key_of(near);
    }
  });
  DilatePlan plan{detail::sort_keys(exec, keys, n * cells), exec.template alloc<int64_t>(n * cells + 1), {}};
  const SortedKeys s = plan.sorted;
  int64_t* const first = plan.first;
  exec.for_each(s.size + 1,
                [=] CVC_HD(int64_t i) { first[i] = i < s.size && s.keys[i] != kNoVoxel && detail::is_head(s, i); });
  plan.found = detail::number(exec, first, s.size, found);
  return plan;
}

template <class Exec>
void emit_dilate(Exec& exec, const DilatePlan& plan, int32_t* coords) {
  const SortedKeys s = plan.sorted;
  const int64_t* const first = plan.first;
  exec.for_each(s.size, [=] CVC_HD(int64_t i) {
    if (first[i + 1] != first[i]) write_voxel(s.keys[i], coords + 4 * first[i]);
  });
}

// --- cuts ------------------------------------------------------------------------------------------------------------

struct KeptPlan {
  int64_t* first;  // of each row: how many are kept before it
  int64_t size, count;
};

template <class Exec, class Keep>
KeptPlan plan_kept(Exec& exec, int64_t n, Keep keep) {
  int64_t* const first = exec.template alloc<int64_t>(n + 1);
  exec.for_each(n + 1, [=] CVC_HD(int64_t i) { first[i] = i < n && keep(i); });
  exec.exclusive_scan(first, first, n + 1);
  return {first, n, exec.read(first + n)};
}

template <class Exec>
void emit_kept(Exec& exec, const KeptPlan& plan, const int32_t* coords, int32_t* kept, int64_t* rows) {
  const int64_t* const first = plan.first;
  exec.for_each(plan.size, [=] CVC_HD(int64_t i) {
    if (first[i + 1] == first[i]) return;
    for (int k = 0; k < 4; ++k) kept[4 * first[i] + k] = coords[4 * i + k];
    rows[first[i]] = i;
  });
}

struct Box {
  int64_t low[3], high[3];

  CVC_HD bool holds(const int32_t* c) const {
    bool inside = true;
    for (int k = 0; k < 3; ++k) inside = inside && c[1 + k] >= low[k] && c[1 + k] < high[k];
    return inside;
  }
};

// One plane (a, b, c, d) for all volumes, or one for each.
struct HalfSpace {
  const double* planes;
  int64_t count;
  double lo, h, slack;

  CVC_HD bool holds(const int32_t* c) const {
    const int64_t volume = count > 1 ? c[0] : 0;
    if (volume < 0 || volume >= count) return false;
    const double* const p = planes + 4 * volume;
    const double xy = times(p[0], center_of(c[1], lo, h)) + times(p[1], center_of(c[2], lo, h));
    return xy + times(p[2], center_of(c[3], lo, h)) + p[3] >= -slack;
  }
};

// Which kept rows have a neighbour, at most `steps` coordinates away by one, among the rows that go.
template <class Exec>
void mark_seam(Exec& exec, const int32_t* coords, const bool* keep, int64_t n, const int32_t* kept, int64_t count,
               int steps, bool* seam) {
  uint64_t* const keys = exec.template alloc<uint64_t>(n);
  exec.for_each(n, [=] CVC_HD(int64_t i) { keys[i] = keep[i] ? kNoVoxel : key_or_none(coords + 4 * i); });
  const SortedKeys gone = detail::sort_keys(exec, keys, n);
  exec.for_each(count, [=] CVC_HD(int64_t i) {
    bool found = false;
    for (int offset = 0; offset < 27; ++offset) {
      const int32_t d[3] = {offset / 9 - 1, offset / 3 % 3 - 1, offset % 3 - 1};
      const int distance = d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
      if (found || distance == 0 || distance > steps) continue;
      const int32_t* const c = kept + 4 * i;
      const int32_t near[4] = {c[0], c[1] + d[0], c[2] + d[1], c[3] + d[2]};
      found = detail::place_of(gone, key_or_none(near)) >= 0;
    }
    seam[i] = found;
  });
}

}  // namespace cvc::voxels
