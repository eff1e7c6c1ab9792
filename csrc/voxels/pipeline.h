// Orders and sets of voxels as pipelines over an executor: CUDA on a GPU, plain loops in the tests (common/exec.h).
//
// Whether voxels are in order already, and which bits of their keys differ, would have to be read back before it
// helped: here everything is sorted by whole keys. Rows that are no voxels have the key kNoVoxel: they come last and
// match nothing.
#pragma once

#include "common/exec.h"
#include "voxels/curves.h"
#include "voxels/keys.h"

namespace cvc::voxels {

constexpr uint64_t kNoVoxel = ~uint64_t{0};

CVC_HD inline uint64_t key_or_none(const int32_t* c) { return is_voxel(c) ? key_of(c) : kNoVoxel; }

struct SortedKeys {
  const uint64_t* keys;
  const int64_t* rows;
  int64_t size;
};

// What a pipeline reads back, in one go.
struct Found {
  int64_t count;
  atomic64 faults;
};

// The order's key of voxel c: any 64-bit integer but kNoVoxel, which is less than 2^15 (2^16 + block - 1)^3.
CVC_HD inline uint64_t order_key(const int32_t* c, int order, uint64_t block) {
  if (!is_voxel(c)) return kNoVoxel;
  uint32_t x = c[1], y = c[2], z = c[3];
  if (order == 0) return key_of(c);
  if (order == 3) {
    const uint64_t blocks = (kMaxCoord + block - 1) / block;
    const uint64_t outer = ((c[0] * blocks + x / block) * blocks + y / block) * blocks + z / block;
    return ((outer * block + x % block) * block + y % block) * block + z % block;
  }
  if (order == 2) hilbert_forward(x, y, z, 18);
  return static_cast<uint64_t>(c[0]) << 3 * kCoordBits | interleave(x, y, z);
}

namespace detail {

template <class Exec>
SortedKeys sort_keys(Exec& exec, uint64_t* keys, int64_t n) {
  uint64_t* const sorted = exec.template alloc<uint64_t>(n);
  int64_t *const rows = exec.template alloc<int64_t>(n), *const order = exec.template alloc<int64_t>(n);
  exec.for_each(n, [=] CVC_HD(int64_t i) { rows[i] = i; });
  exec.sort_pairs(keys, sorted, rows, order, n);
  return {sorted, order, n};
}

template <class Exec>
SortedKeys sort_voxels(Exec& exec, const int32_t* coords, int64_t n) {
  uint64_t* const keys = exec.template alloc<uint64_t>(n);
  exec.for_each(n, [=] CVC_HD(int64_t i) { keys[i] = key_or_none(coords + 4 * i); });
  return sort_keys(exec, keys, n);
}

CVC_HD inline bool is_head(const SortedKeys& s, int64_t i) { return i == 0 || s.keys[i] != s.keys[i - 1]; }

CVC_HD inline int64_t first_not_less(const SortedKeys& s, uint64_t key) {
  int64_t begin = 0, end = s.size;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (s.keys[middle] < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// The first place of a key, which is that of its lowest row; -1 when the key is not there.
CVC_HD inline int64_t place_of(const SortedKeys& s, uint64_t key) {
  const int64_t place = first_not_less(s, key);
  return place < s.size && s.keys[place] == key && key != kNoVoxel ? place : -1;
}

// ORs what is wrong with a set into the result; `twice` is 0 where rows may repeat.
template <class Exec>
void find_faults(Exec& exec, SortedKeys s, int64_t outside, int64_t twice, Found* found) {
  exec.for_each(s.size, [=] CVC_HD(int64_t i) {
    int64_t bits = 0;
    if (s.keys[i] == kNoVoxel) {
      bits = outside;
    } else if (!is_head(s, i)) {
      bits = twice;
    }
    if (bits != 0) atomic_or(&found->faults, static_cast<atomic64>(bits));
  });
}

template <class Exec>
Found* new_found(Exec& exec) {
  Found* const found = exec.template alloc<Found>(1);
  exec.for_each(1, [=] CVC_HD(int64_t) { *found = {0, 0}; });
  return found;
}

// first[i] = how many of the flags before i are set; their number and the faults are read back.
template <class Exec>
Found number(Exec& exec, int64_t* first, int64_t n, Found* found) {
  exec.exclusive_scan(first, first, n + 1);
  exec.for_each(1, [=] CVC_HD(int64_t) { found->count = first[n]; });
  return exec.read(found);
}

}  // namespace detail

// --- unique and union ------------------------------------------------------------------------------------------------

struct DistinctPlan {
  SortedKeys sorted;
  int64_t* first;  // of each place: how many distinct voxels come before it
  Found found;
};

namespace detail {

// key(i, &fault) gives the key of row i, and what is wrong with it.
template <class Exec, class Key>
DistinctPlan plan_keys(Exec& exec, int64_t n, Key key) {
  uint64_t* const keys = exec.template alloc<uint64_t>(n);
  Found* const found = new_found(exec);
  exec.for_each(n, [=] CVC_HD(int64_t i) {
    int64_t fault = 0;
    keys[i] = key(i, &fault);
    if (fault != 0) atomic_or(&found->faults, static_cast<atomic64>(fault));
  });
  DistinctPlan plan{sort_keys(exec, keys, n), exec.template alloc<int64_t>(n + 1), {}};
  const SortedKeys sorted = plan.sorted;
  int64_t* const first = plan.first;
  exec.for_each(n + 1, [=] CVC_HD(int64_t i) { first[i] = i < n && is_head(sorted, i); });
  plan.found = number(exec, first, n, found);
  return plan;
}

}  // namespace detail

// Of the rows of a and, after them, those of b (null: none).
template <class Exec>
DistinctPlan plan_distinct(Exec& exec, const int32_t* a, int64_t na, const int32_t* b, int64_t nb) {
  return detail::plan_keys(exec, na + nb, [=] CVC_HD(int64_t i, int64_t* fault) {
    const uint64_t key = key_or_none(i < na ? a + 4 * i : b + 4 * (i - na));
    if (key == kNoVoxel) *fault = i < na ? kOutOfRange : kOutOfRangeSecond;
    return key;
  });
}

// Writes the distinct voxels and where every row is; counts and lowest rows unless null.
template <class Exec>
void emit_distinct(Exec& exec, const DistinctPlan& plan, int64_t na, int32_t* coords, int64_t* index_a,
                   int64_t* index_b, int64_t* counts, int64_t* lowest) {
  const SortedKeys s = plan.sorted;
  const int64_t* const first = plan.first;
  int64_t* const begin = exec.template alloc<int64_t>(plan.found.count + 1);
  exec.for_each(s.size, [=] CVC_HD(int64_t i) {
    const int64_t id = first[i + 1] - 1, row = s.rows[i];
    (row < na ? index_a[row] : index_b[row - na]) = id;
    if (!detail::is_head(s, i)) return;
    write_voxel(s.keys[i], coords + 4 * id);
    begin[id] = i;
    if (lowest != nullptr) lowest[id] = row;
  });
  if (counts == nullptr) return;
  const int64_t count = plan.found.count;
  exec.for_each(count, [=] CVC_HD(int64_t id) { counts[id] = (id + 1 < count ? begin[id + 1] : s.size) - begin[id]; });
}

// --- intersection and difference -------------------------------------------------------------------------------------

struct SelectPlan {
  SortedKeys a, b;
  int64_t* first;
  Found found;
};

// Voxels of a that are in b, or that are not.
template <class Exec>
SelectPlan plan_select(Exec& exec, const int32_t* a, int64_t na, const int32_t* b, int64_t nb, bool in_b,
                       bool assume_unique) {
  SelectPlan plan{
      detail::sort_voxels(exec, a, na), detail::sort_voxels(exec, b, nb), exec.template alloc<int64_t>(na + 1), {}};
  Found* const found = detail::new_found(exec);
  detail::find_faults(exec, plan.a, kOutOfRange, kDuplicate * !assume_unique, found);
  detail::find_faults(exec, plan.b, kOutOfRangeSecond, kDuplicateSecond * (in_b && !assume_unique), found);
  const SortedKeys sa = plan.a, sb = plan.b;
  int64_t* const first = plan.first;
  exec.for_each(na + 1, [=] CVC_HD(int64_t i) {
    first[i] = i < na && detail::is_head(sa, i) && (detail::place_of(sb, sa.keys[i]) >= 0) == in_b;
  });
  plan.found = detail::number(exec, first, na, found);
  return plan;
}

// index_b is null for a difference.
template <class Exec>
void emit_select(Exec& exec, const SelectPlan& plan, int32_t* coords, int64_t* index_a, int64_t* index_b) {
  const SortedKeys a = plan.a, b = plan.b;
  const int64_t* const first = plan.first;
  exec.for_each(a.size, [=] CVC_HD(int64_t i) {
    const int64_t id = first[i];
    if (first[i + 1] == id) return;
    write_voxel(a.keys[i], coords + 4 * id);
    index_a[id] = a.rows[i];
    if (index_b != nullptr) index_b[id] = b.rows[detail::place_of(b, a.keys[i])];
  });
}

// --- of fixed size: nothing is read back -----------------------------------------------------------------------------

template <class Exec>
void is_in(Exec& exec, const int32_t* a, int64_t na, const int32_t* b, int64_t nb, bool* out) {
  const SortedKeys s = detail::sort_voxels(exec, b, nb);
  exec.for_each(na, [=] CVC_HD(int64_t i) { out[i] = detail::place_of(s, key_or_none(a + 4 * i)) >= 0; });
}

template <class Exec>
void look_up_rows(Exec& exec, const int32_t* coords, int64_t n, const int32_t* query, int64_t m, int64_t* out) {
  const SortedKeys s = detail::sort_voxels(exec, coords, n);
  exec.for_each(m, [=] CVC_HD(int64_t i) {
    const int64_t place = detail::place_of(s, key_or_none(query + 4 * i));
    out[i] = place < 0 ? -1 : s.rows[place];
  });
}

template <class Exec>
void write_keys(Exec& exec, const int32_t* coords, int64_t n, int64_t* out) {
  exec.for_each(n, [=] CVC_HD(int64_t i) { out[i] = static_cast<int64_t>(key_or_none(coords + 4 * i)); });
}

template <class Exec>
void sort_rows(Exec& exec, const int32_t* coords, int64_t n, int order, int64_t block, int32_t* sorted,
               int64_t* permutation, int64_t* inverse) {
  uint64_t* const keys = exec.template alloc<uint64_t>(n);
  exec.for_each(n, [=] CVC_HD(int64_t i) { keys[i] = order_key(coords + 4 * i, order, block); });
  const SortedKeys s = detail::sort_keys(exec, keys, n);
  exec.for_each(n, [=] CVC_HD(int64_t i) {
    const int64_t row = s.rows[i];
    permutation[i] = row;
    inverse[row] = i;
    for (int k = 0; k < 4; ++k) sorted[4 * i + k] = coords[4 * row + k];
  });
}

template <class Exec>
void encode_cells(Exec& exec, const int32_t* coords, int64_t n, bool hilbert, int64_t* codes) {
  exec.for_each(n, [=] CVC_HD(int64_t i) {
    uint32_t x = coords[3 * i], y = coords[3 * i + 1], z = coords[3 * i + 2];
    const bool inside = (x | y | z) >> kCurveBits == 0;
    if (hilbert) hilbert_forward(x, y, z, kCurveBits);
    codes[i] = inside ? static_cast<int64_t>(interleave(x, y, z)) : -1;
  });
}

template <class Exec>
void decode_cells(Exec& exec, const int64_t* codes, int64_t n, bool hilbert, int32_t* coords) {
  exec.for_each(n, [=] CVC_HD(int64_t i) {
    const uint64_t code = static_cast<uint64_t>(codes[i]);
    uint32_t x = gather3(code >> 2), y = gather3(code >> 1), z = gather3(code);
    if (hilbert) hilbert_backward(x, y, z, kCurveBits);
    const bool valid = codes[i] >= 0;
    coords[3 * i] = valid ? static_cast<int32_t>(x) : -1;
    coords[3 * i + 1] = valid ? static_cast<int32_t>(y) : -1;
    coords[3 * i + 2] = valid ? static_cast<int32_t>(z) : -1;
  });
}

}  // namespace cvc::voxels
