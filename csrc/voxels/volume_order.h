// What is known of voxels in a dense volume: whether they all lie in it, ascend, or repeat.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>

#include "voxels/tasks.h"
#include "voxels/volume.h"

namespace cvc::voxels {

inline Volume volume_of(int64_t batch, int64_t x, int64_t y, int64_t z) {
  return {{static_cast<uint32_t>(batch), static_cast<uint32_t>(x), static_cast<uint32_t>(y), static_cast<uint32_t>(z)}};
}

// Writes the cell of every voxel.
inline Order order_of(const int32_t* coords, int64_t n, const Volume& volume, int64_t* cells) {
  std::atomic<bool> inside{true}, ascending{true};
  for_each_range(n, [&](int64_t begin, int64_t end) {
    bool in = true, up = true;
    int64_t before = begin > 0 ? volume.cell(coords + 4 * (begin - 1)) : -1;
    for (int64_t i = begin; i < end; ++i) {
      in &= volume.holds(coords + 4 * i);
      const int64_t cell = volume.cell(coords + 4 * i);
      up &= before < cell;
      cells[i] = before = cell;
    }
    if (!in) inside.store(false, std::memory_order_relaxed);
    if (!up) ascending.store(false, std::memory_order_relaxed);
  });
  return {inside.load(), ascending.load()};
}

// Whether a cell is named twice; one bit per cell.
inline bool any_twice(const int64_t* cells, int64_t n, int64_t size) {
  Buffer<uint64_t> seen((size + 63) / 64);
  for_each_range(seen.size(), [&](int64_t begin, int64_t end) {
    std::memset(seen.data() + begin, 0, (end - begin) * sizeof(uint64_t));
  });
  std::atomic<bool> twice{false};
  for_each_range(n, [&](int64_t begin, int64_t end) {
    bool found = false;
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t bit = uint64_t{1} << (cells[i] % 64);
      std::atomic_ref<uint64_t> word(seen[cells[i] / 64]);
      found |= (word.fetch_or(bit, std::memory_order_relaxed) & bit) != 0;
    }
    if (found) twice.store(true, std::memory_order_relaxed);
  });
  return twice.load();
}

// Calls f with a number as wide as the elements.
template <class F>
auto by_width(const torch::stable::Tensor& tensor, const F& f) {
  switch (tensor.element_size()) {
    case 2: return f(uint16_t{});
    case 8: return f(uint64_t{});
    default: return f(uint32_t{});
  }
}

}  // namespace cvc::voxels
