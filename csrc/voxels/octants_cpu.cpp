#include "voxels/octants_cpu.h"

#include <bit>

#include "common/isa.h"
#include "voxels/cells.h"

namespace cvc::voxels {

// As large as the slabs so far needed it.
struct Octants::Map {
  explicit Map(const Factor& factor) {
    const Divider* const f[3] = {&factor.x, &factor.y, &factor.z};
    for (int k = 0; k < 3; ++k) map.half[k] = f[k]->value == 2;
    resize(64, 64);
  }

  void resize(int64_t lines, int64_t width) {
    if (lines * width > bytes.size()) bytes = Buffer<uint8_t>(lines * width);
    std::memset(bytes.data(), 0, bytes.size());
    map.children = bytes.data();
    map.lines = lines;
    map.width = width;
  }

  OctantMap map;
  Buffer<uint8_t> bytes;
};

Octants::Octants(const torch::stable::Tensor& coords, const Factor& factor)
    : rows_(coords), factor_(factor), kernels_(CVC_ISA_PICK(octant_kernels)()) {
  const std::vector<int64_t> begin = rows_.cut(factor);
  for (size_t t = 0; t + 1 < begin.size(); ++t) tasks_.push_back({begin[t], begin[t + 1], 0, 0, {}, {}});
  const int64_t room = rows_.size + 64 * static_cast<int64_t>(begin.size());
  children_ = Buffer<uint8_t>(room);
  z_ = Buffer<uint16_t>(room);
}

std::optional<Octants> Octants::of(const torch::stable::Tensor& coords, const Factor& factor) {
  if (factor.most() > 2 || !starts_in_order(coords) || coords.size(0) >> 32 > 0) return std::nullopt;
  Octants octants(coords, factor);
  std::atomic<bool> fine{true};
  for_each_task(
      static_cast<int64_t>(octants.tasks_.size()), [&] { return Map(factor); },
      [&](int64_t t, Map& map) {
        if (fine.load(std::memory_order_relaxed) && !octants.list(t, map)) fine.store(false);
      });
  if (!fine.load()) return std::nullopt;
  for (Task& task : octants.tasks_) {
    task.first = octants.parents;
    octants.parents += task.parents;
  }
  return octants;
}

// False for voxels that are not what they are taken for.
bool Octants::list(int64_t t, Map& scratch) {
  Task& task = tasks_[t];
  const int64_t bytes_per_row = 4 * words_per_row.load(std::memory_order_relaxed);
  for (int64_t begin = task.begin, end; begin < task.end; begin = end) {
    const uint64_t key = rows_.key(begin), limit = factor_.next_slab(key);
    OctantRows rows = kernels_->mark(scratch.map, rows_.coords, begin, task.end, limit);
    end = rows.end;
    if (end == begin || !rows.fine) return false;
    // In whole words of 64 along z.
    const int64_t lines = rows.high[0] - rows.low[0] + 1, width = (rows.high[1] / 64 - rows.low[1] / 64 + 1) * 64;
    if (lines * width > bytes_per_row * (end - begin + 256)) return false;
    if (lines > scratch.map.lines || width > scratch.map.width) {
      constexpr int64_t kWidest = 1 << 14, kMost = 1 << 24, kUsual = 1 << 20;
      const auto enough = [](int64_t n) { return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n))); };
      if (width > kWidest || enough(lines) * enough(width) > kMost) return false;
      const int64_t most_lines = std::max(enough(lines), scratch.map.lines);
      const int64_t most_width = std::max(enough(width), scratch.map.width);
      const bool usual = most_lines * most_width <= kUsual;
      scratch.resize(usual ? most_lines : enough(lines), usual ? most_width : enough(width));
      rows = kernels_->mark(scratch.map, rows_.coords, begin, task.end, limit);
    }
    OctantSlab slab{};
    slab.begin = begin;
    slab.end = end;
    slab.planes[0] = begin;
    slab.planes[1] = begin + rows.even;
    slab.batch = static_cast<int32_t>(key >> 48);
    slab.x = static_cast<int32_t>(factor_.x(key >> 32 & 0xFFFF));

    const int64_t known = std::ssize(task.lines), place = room(t) + task.parents;
    task.lines.resize(known + lines);
    kernels_->list(scratch.map, rows, &slab, task.lines.data() + known, z_.data() + place, children_.data() + place);
    task.lines.resize(known + slab.lines);
    task.parents += slab.parents;
    task.slabs.push_back(slab);
  }
  return true;
}

void Octants::write(const OctantOutputs& out) const {
  int64_t most = 0;
  for (const Task& task : tasks_)
    for (const OctantSlab& slab : task.slabs) most = std::max(most, slab.end - slab.begin);
  const auto write_slab = CVC_ISA_PICK(write_octants);
  for_each_task(
      static_cast<int64_t>(tasks_.size()), [=] { return Buffer<uint32_t>(most + 2); },
      [&](int64_t t, const Buffer<uint32_t>& scratch) {
        const Task& task = tasks_[t];
        const OctantLine* lines = task.lines.data();
        int64_t done = 0;
        for (const OctantSlab& slab : task.slabs) {
          const int64_t place = room(t) + done;
          write_slab(slab, lines, z_.data() + place, children_.data() + place, task.first + done, out, scratch.data());
          lines += slab.lines;
          done += slab.parents;
        }
      });
}

}  // namespace cvc::voxels
