// Coarser sets of voxels, and what their features come to. Voxels in order are slabs: stretches of rows whose parents
// have one x. A slab's parents are bits of the rectangle that they fill, so that a parent's row is a count of bits:
// nothing is sorted or compared, and features are read once, in about the order that they lie in, while the sums of the
// parents that they go to stay in a core's own caches. Halving, the usual case, has a quicker way (octants_cpu.h).
#include <torch/csrc/stable/library.h>

#include <bit>
#include <optional>

#include "common/isa.h"
#include "voxels/cells.h"
#include "voxels/coarsen.h"
#include "voxels/join.h"
#include "voxels/join_rows.h"
#include "voxels/octants_cpu.h"

namespace cvc::voxels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Slab {
  int64_t begin, end;    // rows
  int64_t planes;        // rows of one x each, from here on in Task::planes
  int64_t words;         // bits of lines along z, from here on in Task::words
  int64_t lines, width;  // width: words of a line
  int64_t parents;
  int32_t corner[4];  // the parent of bit 0
};

// Whole slabs, one after the other.
struct Task {
  int64_t begin = 0, end = 0;  // rows
  int64_t first = 0;           // row of the first parent
  std::vector<Slab> slabs;
  std::vector<int64_t> planes;  // where they end
  std::vector<uint64_t> words;
};

// Voxels in order, slab by slab.
class Slabs {
 public:
  // Without a value: voxels out of order, or too far apart for bits.
  static std::optional<Slabs> of(const Tensor& coords, const Factor& factor) {
    if (!starts_in_order(coords) || coords.size(0) >> 32 > 0) return std::nullopt;
    Slabs slabs(coords, factor);
    std::atomic<bool> fine{true};
    for_each_task(slabs.tasks(), [&](int64_t t) {
      if (fine.load(std::memory_order_relaxed) && !slabs.mark(slabs.tasks_[t])) fine.store(false);
    });
    if (!fine.load()) return std::nullopt;
    for (Task& task : slabs.tasks_) {
      task.first = slabs.parents;
      for (const Slab& slab : task.slabs) slabs.parents += slab.parents;
    }
    return slabs;
  }

  int64_t tasks() const { return static_cast<int64_t>(tasks_.size()); }
  const Task& task(int64_t t) const { return tasks_[t]; }
  // The bit of every row's parent in its slab.
  const uint32_t* bits() const { return bit_.data(); }

  int64_t parents = 0;

 private:
  Slabs(const Tensor& coords, const Factor& factor) : rows_(coords), factor_(factor), bit_(rows_.size) {
    const std::vector<int64_t> begin = rows_.cut(factor);
    tasks_.resize(begin.size() - 1);
    for (size_t t = 0; t < tasks_.size(); ++t) {
      tasks_[t].begin = begin[t];
      tasks_[t].end = begin[t + 1];
    }
  }

  // Finds the slabs of a task and their parents. False for voxels that are not what they are taken for.
  bool mark(Task& task) {
    const int64_t per_row = words_per_row.load(std::memory_order_relaxed);
    for (int64_t begin = task.begin, end; begin < task.end; begin = end) {
      const uint64_t limit = factor_.next_slab(rows_.key(begin));
      end = std::max(begin + 1, rows_.find(limit, begin, task.end));
      const Scan scan = scan_rows(rows_.coords, begin, end, nullptr);
      if (!scan.in_range || !scan.ascending || rows_.key(end - 1) >= limit) return false;

      const auto parent = [&](uint64_t key) {
        return std::pair(factor_.y(key >> 16 & 0xFFFF), factor_.z(key & 0xFFFF));
      };
      const auto [y, z] = parent(scan.lowest);
      const auto [last_y, last_z] = parent(scan.highest);
      Slab slab{
          begin,
          end,
          std::ssize(task.planes),
          std::ssize(task.words),
          last_y - y + 1,
          (last_z - z) / 64 + 1,
          0,
          {rows_.coords[4 * begin], static_cast<int32_t>(factor_.x(static_cast<uint32_t>(rows_.coords[4 * begin + 1]))),
           static_cast<int32_t>(y), static_cast<int32_t>(z)}};
      if (slab.words + slab.lines * slab.width > per_row * ((end - task.begin) / 2 + 256)) return false;
      for (int64_t plane = begin; plane < end; task.planes.push_back(plane))
        plane = rows_.find((rows_.key(plane) | 0xFFFFFFFFu) + 1, plane, end);
      task.words.resize(slab.words + slab.lines * slab.width, 0);
      set(slab, task.words.data() + slab.words);
      for (int64_t w = slab.words; w < std::ssize(task.words); ++w) slab.parents += std::popcount(task.words[w]);
      task.slabs.push_back(slab);
    }
    return true;
  }

  void set(const Slab& slab, uint64_t* words) {
    const Divider y = factor_.y, z = factor_.z;
    if (std::has_single_bit(y.value) && std::has_single_bit(z.value)) {  // the usual ones: no products
      const int by_y = std::countr_zero(y.value), by_z = std::countr_zero(z.value);
      set(slab, words, [=](uint32_t c) { return c >> by_y; }, [=](uint32_t c) { return c >> by_z; });
    } else {
      set(slab, words, y, z);
    }
  }
  // Neighbours share a word, whose next bit has to wait for the last one: four stretches take turns.
  template <class Y, class Z>
  void set(const Slab& slab, uint64_t* words, const Y& y, const Z& z) {
    const uint32_t stride = static_cast<uint32_t>(64 * slab.width);
    const uint32_t origin = static_cast<uint32_t>(slab.corner[2]) * stride + static_cast<uint32_t>(slab.corner[3]);
    const int32_t* const coords = rows_.coords;
    uint32_t* const bits = bit_.data();
    const auto one = [=](int64_t i) {
      uint64_t both;
      std::memcpy(&both, coords + 4 * i + 2, sizeof both);
      const uint32_t bit = y(static_cast<uint32_t>(both)) * stride + z(static_cast<uint32_t>(both >> 32)) - origin;
      bits[i] = bit;
      words[bit >> 6] |= uint64_t{1} << (bit & 63);
    };
    const int64_t quarter = (slab.end - slab.begin) / 4;
    for (int64_t i = slab.begin; i < slab.begin + quarter; ++i)
      for (int k = 0; k < 4; ++k) one(i + k * quarter);
    for (int64_t i = slab.begin + 4 * quarter; i < slab.end; ++i) one(i);
  }

  const OrderedRows rows_;
  const Factor factor_;
  std::vector<Task> tasks_;
  Buffer<uint32_t> bit_;
};

// What the features of parents are made of; no channels without features.
struct Features {
  const char* in = nullptr;
  char* out = nullptr;
  int64_t channels = 0;
  bool is_double = false;
  Reduction reduction = Reduction::sum;
  bool include_self = false;
  bool large = false;  // the result

  int64_t row_bytes() const { return channels * (is_double ? 8 : 4); }
};

// Of some consecutive parents.
class Sums {
 public:
  explicit Sums(const Features& features) : f_(features), kernels_(CVC_ISA_PICK(row_kernels)()) {}

  // As many as stay in a core's own caches.
  int64_t parents_at_once() const { return std::max<int64_t>(8, (1 << 17) / std::max<int64_t>(f_.row_bytes(), 1)); }
  void start(int64_t count) {
    const int64_t bytes = count * f_.row_bytes();
    if (sums_.size() < bytes) sums_ = Buffer<char>(bytes);
    if (f_.is_double) {
      start_rows(reinterpret_cast<double*>(sums_.data()), count * f_.channels, f_.reduction, f_.include_self);
    } else {
      start_rows(reinterpret_cast<float*>(sums_.data()), count * f_.channels, f_.reduction, f_.include_self);
    }
  }
  void join(int64_t row, int64_t count, const uint32_t* parents) {
    if (f_.channels > 0)
      kernels_.join({f_.in + row * f_.row_bytes(), count, f_.channels, parents, sums_.data(), f_.is_double,
                     f_.reduction == Reduction::max});
  }
  // The counts are no longer needed.
  void finish(int64_t first, int64_t count, uint32_t* counts) {
    if (f_.channels == 0) return;
    if (f_.include_self)
      for (int64_t k = 0; k < count; ++k) ++counts[k];
    kernels_.finish({sums_.data(), count, f_.channels, f_.reduction == Reduction::mean ? counts : nullptr,
                     f_.out + first * f_.row_bytes(), f_.is_double, f_.large});
  }

 private:
  const Features f_;
  const RowKernels kernels_;
  Buffer<char> sums_;
};

// Writes the parents of tasks.
class Writer {
 public:
  Writer(const Slabs& slabs, const Features& features, Coarse& coarse)
      : slabs_(slabs),
        coords_(data_of<int32_t>(coarse.coords)),
        inverse_(data_of<int64_t>(coarse.inverse)),
        counts_(data_of<int64_t>(coarse.counts)),
        sums_(features),
        to_(kRows) {}

  void write(const Task& task) {
    int64_t first = task.first;
    for (const Slab& slab : task.slabs) {
      write(slab, task.words.data() + slab.words, task.planes.data() + slab.planes, first);
      first += slab.parents;
    }
  }

 private:
  // Some whole lines of parents after the other, each with all rows that go there, in their order.
  void write(const Slab& slab, const uint64_t* words, const int64_t* plane_ends, int64_t first) {
    next_.assign(1, slab.begin);
    while (plane_ends[next_.size() - 1] < slab.end) next_.push_back(plane_ends[next_.size() - 1]);
    // Not so few that to look into every plane would take the time.
    const int64_t at_once = std::max(sums_.parents_at_once(), 4 * std::ssize(next_));
    before_.resize(slab.lines * slab.width);
    int32_t parent[4] = {slab.corner[0], slab.corner[1], slab.corner[2], 0};
    for (int64_t line = 0, begin = 0, end = 0; line < slab.lines; begin = end) {
      for (; line < slab.lines && end - begin < at_once; ++line, ++parent[2])
        for (int64_t w = 0; w < slab.width; ++w) {
          const int64_t at = line * slab.width + w;
          before_[at] = static_cast<uint32_t>(end - begin);
          for (uint64_t word = words[at]; word; word &= word - 1, ++end) {
            parent[3] = slab.corner[3] + static_cast<int32_t>(64 * w + std::countr_zero(word));
            std::memcpy(coords_ + 4 * (first + end), parent, sizeof parent);
          }
        }
      join_lines(words, plane_ends, static_cast<uint64_t>(64 * line * slab.width), first + begin, end - begin);
    }
  }

  // The rows not yet taken whose bits are below a limit go to `count` parents from `first` on.
  void join_lines(const uint64_t* words, const int64_t* plane_ends, uint64_t limit, int64_t first, int64_t count) {
    count_.assign(count, 0);
    sums_.start(count);
    const uint32_t* const bits = slabs_.bits();
    const uint32_t* const before = before_.data();
    uint32_t *const counts = count_.data(), *const to = to_.data();
    for (size_t p = 0; p < next_.size(); ++p)
      for (bool more = true; more;) {
        const int64_t begin = next_[p], most = std::min(plane_ends[p] - begin, kRows);
        int64_t n = 0;
        for (; n < most && bits[begin + n] < limit; ++n) {
          const uint32_t bit = bits[begin + n];
          const uint64_t lower = words[bit >> 6] & ((uint64_t{1} << (bit & 63)) - 1);
          const uint32_t parent = before[bit >> 6] + static_cast<uint32_t>(std::popcount(lower));
          to[n] = parent;
          inverse_[begin + n] = first + parent;
          ++counts[parent];
        }
        sums_.join(begin, n, to);
        next_[p] += n;
        more = n == kRows;
      }
    std::copy_n(counts, count, counts_ + first);
    sums_.finish(first, count, counts);
  }

  static constexpr int64_t kRows = 256;

  const Slabs& slabs_;
  int32_t* const coords_;
  int64_t *const inverse_, *const counts_;
  Sums sums_;
  std::vector<int64_t> next_;  // row of every plane
  std::vector<uint32_t> before_, count_, to_;
};

void write_parents(const Slabs& slabs, const Features& features, Coarse& coarse) {
  for_each_task(
      slabs.tasks(), [&] { return Writer(slabs, features, coarse); },
      [&](int64_t t, Writer& writer) { writer.write(slabs.task(t)); });
}

Coarse new_coarse(const Tensor& coords, int64_t parents) {
  return {new_coords(coords, parents), new_rows(coords, coords.size(0)), new_rows(coords, parents)};
}

void write_parents(const Octants& octants, const Features& features, Coarse& coarse) {
  octants.write(
      {data_of<int32_t>(coarse.coords),
       data_of<int64_t>(coarse.inverse),
       data_of<int64_t>(coarse.counts),
       {features.in, features.out, features.channels, features.is_double, features.reduction == Reduction::max,
        features.reduction == Reduction::mean, features.include_self, features.large}});
}

std::tuple<Tensor, Tensor, Tensor, int64_t> voxel_coarsen(Tensor coords, int64_t fx, int64_t fy, int64_t fz) {
  if (const auto octants = Octants::of(coords, {fx, fy, fz})) {
    Coarse coarse = new_coarse(coords, octants->parents);
    write_parents(*octants, Features(), coarse);
    return {coarse.coords, coarse.inverse, coarse.counts, 0};
  }
  if (const auto slabs = Slabs::of(coords, {fx, fy, fz})) {
    Coarse coarse = new_coarse(coords, slabs->parents);
    write_parents(*slabs, Features(), coarse);
    return {coarse.coords, coarse.inverse, coarse.counts, 0};
  }
  const auto [coarse, faults] = coarsen_by_lines(coords, fx, fy, fz);
  return {coarse.coords, coarse.inverse, coarse.counts, faults};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t> voxel_downsample(Tensor coords, Tensor feats, int64_t fx,
                                                                     int64_t fy, int64_t fz, int64_t reduction,
                                                                     bool include_self) {
  const auto write = [&](const auto& found) -> std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t> {
    Coarse coarse = new_coarse(coords, found.parents);
    Tensor out = new_tensor(feats, {found.parents, feats.size(1)}, feats.scalar_type());
    const Features features{static_cast<const char*>(feats.const_data_ptr()),
                            data_of<char>(out),
                            feats.size(1),
                            feats.scalar_type() == ScalarType::Double,
                            static_cast<Reduction>(reduction),
                            include_self,
                            out.numel() * static_cast<int64_t>(out.element_size()) > int64_t{8} << 20};
    write_parents(found, features, coarse);
    return {coarse.coords, out, coarse.inverse, coarse.counts, 0};
  };
  if (const auto octants = Octants::of(coords, {fx, fy, fz})) return write(*octants);
  if (const auto slabs = Slabs::of(coords, {fx, fy, fz})) return write(*slabs);
  const auto [coarse, faults] = coarsen_by_lines(coords, fx, fy, fz);
  if (faults) return {coarse.coords, feats, coarse.inverse, coarse.counts, faults};
  const auto [out, ok] = reduce_features(feats, coarse.inverse, coarse.coords.size(0), reduction, include_self);
  return {coarse.coords, out, coarse.inverse, coarse.counts, 0};
}

}  // namespace
}  // namespace cvc::voxels

STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def("voxel_coarsen(Tensor coords, int fx, int fy, int fz) -> (Tensor, Tensor, Tensor, int)");
  m.def(
      "voxel_downsample(Tensor coords, Tensor feats, int fx, int fy, int fz, int reduction, bool include_self)"
      " -> (Tensor, Tensor, Tensor, Tensor, int)");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("voxel_coarsen", TORCH_BOX(&cvc::voxels::voxel_coarsen));
  m.impl("voxel_downsample", TORCH_BOX(&cvc::voxels::voxel_downsample));
}
