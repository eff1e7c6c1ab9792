#include "voxels/octants_cpu.h"

#include "common/isa.h"
#include "voxels/cells.h"

namespace cvc::voxels {

struct Octants::Map {
  // Zeros, as every slab leaves them behind.
  uint8_t* of_size(int64_t size) {
    if (bytes.size() < size) {
      bytes = Buffer<uint8_t>(size);
      std::memset(bytes.data(), 0, size);
    }
    return bytes.data();
  }

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
      static_cast<int64_t>(octants.tasks_.size()), [] { return Map(); },
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
    const uint64_t limit = factor_.next_slab(rows_.key(begin));
    end = std::max(begin + 1, rows_.find(limit, begin, task.end));
    const Scan scan = scan_rows(rows_.coords, begin, end, nullptr);
    if (!scan.in_range || !scan.ascending || !scan.distinct || rows_.key(end - 1) >= limit) return false;

    const auto field = [](uint64_t key, int k) { return static_cast<uint32_t>(key >> (48 - 16 * k) & 0xFFFF); };
    OctantMap map{};
    map.y = static_cast<int32_t>(factor_.y(field(scan.lowest, 2)));
    map.z = static_cast<int32_t>(factor_.z(field(scan.lowest, 3)));
    map.lines = factor_.y(field(scan.highest, 2)) - map.y + 1;
    map.width = ((factor_.z(field(scan.highest, 3)) - map.z) / 64 + 1) * 64;
    map.half_y = factor_.y.value == 2;
    map.half_z = factor_.z.value == 2;
    const int64_t size = map.lines * map.width;
    constexpr int64_t kMost = 1 << 24, kLongest = 1 << 15;
    if (size > bytes_per_row * (end - begin + 256) || size > kMost || map.lines >= kLongest || map.width >= kLongest)
      return false;
    map.children = scratch.of_size(size);

    const uint32_t x = field(rows_.key(begin), 1);
    const int64_t next_x = rows_.find((rows_.key(begin) | 0xFFFFFFFFu) + 1, begin, end);
    const int odd = factor_.x.value == 2 && x % 2 == 1;
    OctantSlab slab{};
    slab.begin = begin;
    slab.end = end;
    slab.planes[odd] = begin;
    slab.planes[1 - odd] = next_x;
    slab.batch = static_cast<int32_t>(field(scan.lowest, 0));
    slab.x = static_cast<int32_t>(factor_.x(x));
    kernels_->mark(map, rows_.coords, begin, next_x, odd);
    kernels_->mark(map, rows_.coords, next_x, end, 1);

    const int64_t lines = std::ssize(task.lines), place = room(t) + task.parents;
    task.lines.resize(lines + map.lines);
    kernels_->list(map, &slab, task.lines.data() + lines, z_.data() + place, children_.data() + place);
    task.lines.resize(lines + slab.lines);
    task.parents += slab.parents;
    task.slabs.push_back(slab);
  }
  return true;
}

void Octants::write(const OctantOutputs& out) const {
  int64_t most = 0;
  for (const Task& task : tasks_)
    for (const OctantSlab& slab : task.slabs) most = std::max(most, slab.end - slab.begin);
  for_each_task(
      static_cast<int64_t>(tasks_.size()), [=] { return Buffer<uint32_t>(most + 2); },
      [&](int64_t t, const Buffer<uint32_t>& scratch) {
        const Task& task = tasks_[t];
        const OctantLine* lines = task.lines.data();
        int64_t done = 0;
        for (const OctantSlab& slab : task.slabs) {
          const int64_t place = room(t) + done;
          kernels_->write(slab, lines, z_.data() + place, children_.data() + place, task.first + done, out,
                          scratch.data());
          lines += slab.lines;
          done += slab.parents;
        }
      });
}

}  // namespace cvc::voxels
