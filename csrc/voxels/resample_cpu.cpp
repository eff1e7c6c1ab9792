// Coarser and finer sets of voxels. Ascending voxels are slabs of planes of lines: what a coarse line needs is a few
// short ascending runs, and what subdivision makes is written front to back, so nothing is sorted again.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <bit>
#include <optional>
#include <tuple>

#include "voxels/ascending.h"
#include "voxels/coarsen.h"

namespace cvc::voxels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

uint32_t x_of(uint64_t key) { return key >> 32 & 0xFFFF; }
uint32_t y_of(uint64_t key) { return key >> 16 & 0xFFFF; }
uint32_t z_of(uint64_t key) { return key & 0xFFFF; }

// --- coarsen ---------------------------------------------------------------------------------------------------------

// The coarse voxels that a task finds, at most one for each given one.
struct Parents {
  Buffer<uint64_t> keys;
  Buffer<int64_t> counts;
  int64_t size = 0;
};

class Coarsener {
 public:
  Coarsener(const Ascending& voxels, int64_t fx, int64_t fy, int64_t fz, int64_t* inverse)
      : voxels_(voxels), fx_(fx), fy_(fy), fz_(fz), inverse_(inverse), bits_(1 << 10, 0), below_(1 << 10) {}

  // All voxels of [begin, end), which holds whole slabs; `inverse` becomes places in `parents`.
  void run(int64_t begin, int64_t end, Parents& parents) {
    for (int64_t at = begin; at < end;) {
      const uint64_t batch = voxels_.key(at) >> 48, x = fx_(x_of(voxels_.key(at)));
      const uint64_t limit = (batch << 48) + (std::min((x + 1) * fx_.value, uint64_t{kMaxCoord}) << 32);
      planes_.clear();
      while (at < end && voxels_.key(at) < limit) {
        const int64_t from = at;
        at = end_of_plane(at, end);
        planes_.push_back({from, at});
      }
      lines(batch << 48 | x << 32, parents);
    }
  }

 private:
  struct Range {
    int64_t begin, end;
  };

  int64_t end_of_plane(int64_t at, int64_t end) const {
    const uint64_t next = (voxels_.key(at) | 0xFFFFFFFFu) + 1;
    return std::lower_bound(voxels_.keys + at, voxels_.keys + end, next) - voxels_.keys;
  }

  void lines(uint64_t key, Parents& parents) {
    constexpr uint32_t kNone = ~uint32_t{0};
    for (;;) {
      uint32_t y = kNone;
      for (const Range& p : planes_)
        if (p.begin < p.end) y = std::min(y, fy_(y_of(voxels_.key(p.begin))));
      if (y == kNone) return;
      line(key | uint64_t{y} << 16, y, parents);
    }
  }

  // One coarse line: mark its voxels as bits, number them, and look every given voxel's number up.
  void line(uint64_t key, uint32_t y, Parents& parents) {
    uint32_t low = ~uint32_t{0}, high = 0;
    runs_.clear();
    const uint64_t beyond = (y + uint64_t{1}) * fy_.value << 16;  // in the lower half of a key
    for (Range& p : planes_) {
      const int64_t from = p.begin;
      int64_t i = from;
      for (; i < p.end && (voxels_.key(i) & 0xFFFFFFFFu) < beyond; ++i) {
        const uint32_t z = fz_(z_of(voxels_.key(i)));
        bits_[z >> 6] |= uint64_t{1} << (z & 63);
        low = std::min(low, z >> 6);
        high = std::max(high, z >> 6);
      }
      if (from < i) runs_.push_back({from, i});
      p.begin = i;
    }
    int64_t count = parents.size;
    for (uint32_t w = low; w <= high; ++w) {
      below_[w] = count;
      for (uint64_t word = bits_[w]; word; word &= word - 1, ++count) {
        parents.keys[count] = key | (64 * w + std::countr_zero(word));
        parents.counts[count] = 0;
      }
    }
    parents.size = count;
    for (const Range& r : runs_)
      for (int64_t i = r.begin; i < r.end; ++i) {
        const uint32_t z = fz_(z_of(voxels_.key(i)));
        const uint64_t lower = bits_[z >> 6] & ((uint64_t{1} << (z & 63)) - 1);
        const int64_t place = below_[z >> 6] + std::popcount(lower);
        inverse_[voxels_.row(i)] = place;
        ++parents.counts[place];
      }
    for (uint32_t w = low; w <= high; ++w) bits_[w] = 0;
  }

  const Ascending& voxels_;
  const Divider fx_, fy_, fz_;
  int64_t* const inverse_;
  std::vector<uint64_t> bits_;
  std::vector<int64_t> below_;
  std::vector<Range> planes_, runs_;
};

}  // namespace

std::tuple<Coarse, int64_t> coarsen_by_lines(const Tensor& coords, int64_t fx, int64_t fy, int64_t fz) {
  const Ascending voxels(coords);
  const Tensor nothing = torch::stable::new_empty(coords, {0}, ScalarType::Long);
  if (voxels.faults) return {Coarse{nothing, nothing, nothing}, voxels.faults};
  const std::vector<int64_t> ends = group_ranges(voxels, [&](uint64_t key) {
    return key >> 48 << 48 | uint64_t{x_of(key) / static_cast<uint32_t>(fx) * static_cast<uint32_t>(fx)} << 32;
  });
  const int64_t tasks = static_cast<int64_t>(ends.size()) - 1;
  Tensor inverse = new_tensor(coords, {voxels.size}, ScalarType::Long);
  int64_t* const place = data_of<int64_t>(inverse);
  std::vector<Parents> parents(tasks);
  std::vector<int64_t> first(tasks);
  for_each_task(tasks, [&](int64_t t) {
    parents[t].keys = Buffer<uint64_t>(ends[t + 1] - ends[t]);
    parents[t].counts = Buffer<int64_t>(ends[t + 1] - ends[t]);
    Coarsener(voxels, fx, fy, fz, place).run(ends[t], ends[t + 1], parents[t]);
    first[t] = parents[t].size;
  });
  const int64_t total = running_sums(first);
  Tensor coarse = new_tensor(coords, {total, 4}, ScalarType::Int);
  Tensor counts = new_tensor(coords, {total}, ScalarType::Long);
  int32_t* const out = data_of<int32_t>(coarse);
  int64_t* const count = data_of<int64_t>(counts);
  for_each_task(tasks, [&](int64_t t) {
    for (int64_t k = 0; k < parents[t].size; ++k) {
      write_voxel(parents[t].keys[k], out + 4 * (first[t] + k));
      count[first[t] + k] = parents[t].counts[k];
    }
    if (first[t] > 0)
      for (int64_t i = ends[t]; i < ends[t + 1]; ++i) place[voxels.row(i)] += first[t];
  });
  return {Coarse{coarse, inverse, counts}, 0};
}

namespace {

// --- children --------------------------------------------------------------------------------------------------------

// Calls emit(i, child) for the wanted children of the plane [begin, end), in ascending order of the children.
template <class Wanted, class Emit>
void children_of_plane(const Ascending& voxels, int64_t begin, int64_t end, const Wanted& wanted, const Emit& emit) {
  for (int dx = 0; dx < 8; dx += 4)
    for (int64_t line = begin, next; line < end; line = next) {
      for (next = line; next < end && voxels.key(next) >> 16 == voxels.key(line) >> 16;) ++next;
      for (int dy = 0; dy < 4; dy += 2)
        for (int64_t i = line, last; i < next; i = last) {
          for (last = i + 1; !voxels.distinct && last < next && voxels.key(last) == voxels.key(i);) ++last;
          for (int child = dx + dy; child <= dx + dy + 1; ++child)
            for (int64_t k = i; k < last; ++k)
              if (wanted(k, child)) emit(k, child);
        }
    }
}

std::tuple<Tensor, Tensor, bool> voxel_children(Tensor coords, std::optional<Tensor> mask) {
  const Ascending voxels(coords);
  const Tensor nothing = torch::stable::new_empty(coords, {0}, ScalarType::Long);
  if (voxels.faults || (voxels.size > 0 && (voxels.given.scan[0].highest & 0x800080008000u)))
    return {nothing, nothing, true};
  const uint8_t* const chosen = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  const std::vector<int64_t> ends = group_ranges(voxels, [](uint64_t key) { return key >> 32 << 32; });
  const int64_t tasks = static_cast<int64_t>(ends.size()) - 1;
  std::vector<int64_t> first(tasks);
  for_each_task(tasks, [&](int64_t t) {
    int64_t count = 8 * (ends[t + 1] - ends[t]);
    if (chosen) {
      count = 0;
      for (int64_t i = ends[t]; i < ends[t + 1]; ++i) {
        uint64_t eight;
        std::memcpy(&eight, chosen + 8 * voxels.row(i), sizeof eight);
        count += std::popcount(eight);
      }
    }
    first[t] = count;
  });
  const int64_t total = running_sums(first);
  Tensor fine = new_tensor(coords, {total, 4}, ScalarType::Int);
  Tensor parents = new_tensor(coords, {total}, ScalarType::Long);
  int32_t* const out = data_of<int32_t>(fine);
  int64_t* const parent = data_of<int64_t>(parents);
  for_each_task(tasks, [&](int64_t t) {
    int64_t at = first[t];
    const auto emit = [&](int64_t i, int child) {
      const uint64_t key = voxels.key(i);
      const uint64_t xyz = (key & 0x7FFF7FFF7FFFu) << 1;
      write_voxel(key >> 48 << 48 | xyz | uint64_t(child >> 2) << 32 | uint64_t(child >> 1 & 1) << 16 | (child & 1),
                  out + 4 * at);
      parent[at++] = voxels.row(i);
    };
    for (int64_t begin = ends[t], end; begin < ends[t + 1]; begin = end) {
      for (end = begin; end < ends[t + 1] && voxels.key(end) >> 32 == voxels.key(begin) >> 32;) ++end;
      if (chosen) {
        children_of_plane(
            voxels, begin, end, [&](int64_t i, int child) { return chosen[8 * voxels.row(i) + child] != 0; }, emit);
      } else {
        children_of_plane(voxels, begin, end, [](int64_t, int) { return true; }, emit);
      }
    }
  });
  return {fine, parents, false};
}

// --- channels --------------------------------------------------------------------------------------------------------

// Where the channels of every voxel are among those of all coarse ones: the coarse row · children + the child.
Tensor voxel_child_slots(Tensor coords, Tensor coarse_row, int64_t fx, int64_t fy, int64_t fz) {
  const int64_t n = coords.size(0);
  const int32_t* const in = static_cast<const int32_t*>(coords.const_data_ptr());
  const int64_t* const row = static_cast<const int64_t*>(coarse_row.const_data_ptr());
  Tensor slots = new_tensor(coords, {n}, ScalarType::Long);
  int64_t* const out = data_of<int64_t>(slots);
  const Divider x(fx), y(fy), z(fz);
  for_each_range(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto rest = [&](int axis, const Divider& by) {
        const uint32_t c = static_cast<uint32_t>(in[4 * i + axis]) & 0xFFFF;
        return int64_t{c - by(c) * by.value};
      };
      out[i] = ((row[i] * fx + rest(1, x)) * fy + rest(2, y)) * fz + rest(3, z);
    }
  });
  return slots;
}

}  // namespace
}  // namespace cvc::voxels

STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def("voxel_children(Tensor coords, Tensor? mask) -> (Tensor, Tensor, bool)");
  m.def("voxel_child_slots(Tensor coords, Tensor coarse_row, int fx, int fy, int fz) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("voxel_children", TORCH_BOX(&cvc::voxels::voxel_children));
  m.impl("voxel_child_slots", TORCH_BOX(&cvc::voxels::voxel_child_slots));
}
