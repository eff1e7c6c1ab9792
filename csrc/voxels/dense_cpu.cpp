// Dense volumes → sparse voxels and back: coordinates of occupied cells, features into volumes (back:
// from_dense_cpu.cpp).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <bit>
#include <tuple>

#include "voxels/fill.h"
#include "voxels/keys.h"
#include "voxels/tasks.h"
#include "voxels/volume_order.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace cvc::voxels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- occupancy → coordinates -----------------------------------------------------------------------------------------

// One bit per cell, 64 cells at a time, so that the volume is read once: first the bits are made and counted, then
// written out as rows.
template <class T, class Above>
Tensor occupied(const Tensor& occupancy, const Above& above) {
  const int64_t sizes[3] = {occupancy.size(1), occupancy.size(2), occupancy.size(3)};
  const int64_t lines = occupancy.size(0) * sizes[0] * sizes[1], depth = sizes[2], words = (depth + 63) / 64;
  const T* const in = static_cast<const T*>(occupancy.const_data_ptr());
  const Chunks chunks(lines, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(depth, 1)));
  Buffer<uint64_t> bits(lines * words);
  std::vector<int64_t> first(chunks.count, 0);
  for_each_task(chunks.count, [&](int64_t c) {
    int64_t count = 0;
    for (int64_t line = chunks.begin(c); line < chunks.end(c); ++line) {
      const T* const cell = in + line * depth;
      for (int64_t w = 0; w < words; ++w) {
        const int64_t n = std::min<int64_t>(64, depth - 64 * w);
        uint8_t flags[64] = {};
        for (int64_t k = 0; k < n; ++k) flags[k] = above(cell[64 * w + k]);
        uint64_t word = 0;
        for (int k = 0; k < 64; k += 8) {  // eight bytes of 0 or 1 to eight bits
          uint64_t eight;
          std::memcpy(&eight, flags + k, 8);
          word |= (eight * 0x0102040810204080u >> 56) << k;
        }
        bits[line * words + w] = word;
        count += std::popcount(word);
      }
    }
    first[c] = count;
  });
  Tensor coords = new_tensor(occupancy, {running_sums(first), 4}, ScalarType::Int);
  int32_t* const out = data_of<int32_t>(coords);
  for_each_task(chunks.count, [&](int64_t c) {
    int32_t* row = out + 4 * first[c];
    for (int64_t line = chunks.begin(c); line < chunks.end(c); ++line) {
      const int32_t y = static_cast<int32_t>(line % sizes[1]), x = static_cast<int32_t>(line / sizes[1] % sizes[0]);
      const int32_t b = static_cast<int32_t>(line / sizes[1] / sizes[0]);
      for (int64_t w = 0; w < words; ++w)
        for (uint64_t word = bits[line * words + w]; word; word &= word - 1, row += 4) {
          const int32_t found[4] = {b, x, y, static_cast<int32_t>(64 * w + std::countr_zero(word))};
          std::memcpy(row, found, sizeof found);
        }
    }
  });
  return coords;
}

Tensor occupancy_to_coords(Tensor occupancy, double threshold) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  const float single = static_cast<float>(threshold);
  switch (occupancy.scalar_type()) {
    case ScalarType::Double: return occupied<double>(occupancy, [=](double v) { return v > threshold; });
    case ScalarType::Half: {
      const float limit = static_cast<float>(Half(single));
      return occupied<Half>(occupancy, [=](Half v) { return static_cast<float>(v) > limit; });
    }
    case ScalarType::BFloat16: {
      const float limit = static_cast<float>(BFloat16(single));
      return occupied<BFloat16>(occupancy, [=](BFloat16 v) { return static_cast<float>(v) > limit; });
    }
    case ScalarType::Float: return occupied<float>(occupancy, [=](float v) { return v > single; });
    default: return occupied<uint8_t>(occupancy, [=](uint8_t v) { return v > single; });  // bool, too
  }
}

// --- sparse → dense --------------------------------------------------------------------------------------------------

// The rows whose cells lie in [begin, end), among ascending cells.
int64_t first_row(const int64_t* cells, int64_t n, int64_t cell) {
  return std::lower_bound(cells, cells + n, cell) - cells;
}

template <class T>
void fill_cells(T* out, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) out[i] = value;
}

// Writes what no one will read soon past the caches: the lines need not be fetched first.
void stream(const char* from, int64_t bytes, char* to) {
#if defined(__SSE2__)
  int64_t i = 0;
  for (; i < bytes && (reinterpret_cast<uintptr_t>(to + i) & 15); ++i) to[i] = from[i];
  for (; i + 16 <= bytes; i += 16) {
    __m128i lanes;
    std::memcpy(&lanes, from + i, sizeof lanes);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), lanes);
  }
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

void streamed() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Ascending voxels: every task puts a stretch of cells together in cache, channel by channel, and writes it out once.
template <class T>
void scatter_ascending(const T* feats, const int64_t* cells, int64_t n, int64_t channels, const Volume& volume, T fill,
                       T* out) {
  constexpr int64_t kStretch = (1 << 14) / sizeof(T), kPerTask = 16;
  const int64_t size = volume.cells(), per_volume = (size + kStretch - 1) / kStretch;
  const int64_t stretches = volume.size[0] * per_volume;
  const bool large = stretches * kStretch * channels * static_cast<int64_t>(sizeof(T)) > (int64_t{8} << 20);
  for_each_task((stretches + kPerTask - 1) / kPerTask, [&](int64_t task) {
    alignas(64) T stretch[kStretch];
    fill_cells(stretch, kStretch, fill);
    for (int64_t s = task * kPerTask; s < std::min(stretches, (task + 1) * kPerTask); ++s) {
      const int64_t b = s / per_volume, from = s % per_volume * kStretch, count = std::min(size - from, kStretch);
      const int64_t base = b * size + from;
      const int64_t first = first_row(cells, n, base), last = first_row(cells, n, base + count);
      for (int64_t c = 0; c < channels; ++c) {
        const T* const values = feats + c;
        for (int64_t i = first; i < last; ++i) stretch[cells[i] - base] = values[i * channels];
        T* const to = out + (b * channels + c) * size + from;
        if (large) {
          stream(reinterpret_cast<const char*>(stretch), count * sizeof(T), reinterpret_cast<char*>(to));
        } else {
          std::memcpy(to, stretch, count * sizeof(T));
        }
      }
      for (int64_t i = first; i < last; ++i) stretch[cells[i] - base] = fill;
    }
    streamed();
  });
}

// Any order. Of equal voxels the lowest row counts: they are written by one task, the last row first.
template <class T>
void scatter_any(const T* feats, const int64_t* cells, int64_t n, int64_t channels, const Volume& volume, T fill,
                 bool distinct, T* out) {
  const int64_t size = volume.cells();
  for_each_range(volume.size[0] * channels * size,
                 [&](int64_t begin, int64_t end) { fill_cells(out + begin, end - begin, fill); });
  const auto write = [&](int64_t i) {
    const int64_t b = cells[i] / size;
    T* const cell = out + b * channels * size + (cells[i] - b * size);
    for (int64_t c = 0; c < channels; ++c) cell[c * size] = feats[i * channels + c];
  };
  if (!distinct) {
    for (int64_t i = n; i-- > 0;) write(i);
    return;
  }
  for_each_range(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) write(i);
  });
}

std::tuple<Tensor, int64_t> voxels_to_dense(Tensor feats, Tensor coords, int64_t batch, int64_t x, int64_t y, int64_t z,
                                            double fill, bool assume_unique) {
  const int64_t n = coords.size(0), channels = feats.size(1);
  const Volume volume = volume_of(batch, x, y, z);
  Buffer<int64_t> cells(n);
  const Order order = order_of(static_cast<const int32_t*>(coords.const_data_ptr()), n, volume, cells.data());
  Tensor nothing = torch::stable::new_empty(feats, {0}, feats.scalar_type());
  if (!order.inside) return {nothing, kOutOfRange};
  const bool distinct = order.ascending || !any_twice(cells.data(), n, batch * volume.cells());
  if (!distinct && !assume_unique) return {nothing, kDuplicate};

  Tensor dense = new_tensor(feats, {batch, channels, x, y, z}, feats.scalar_type());
  by_width(feats, [&](auto zero) {
    using T = decltype(zero);
    T value;
    char bytes[8];
    fill_row(feats.scalar_type(), fill, 1, bytes);
    std::memcpy(&value, bytes, sizeof value);
    const T* const in = static_cast<const T*>(feats.const_data_ptr());
    if (order.ascending) {
      scatter_ascending(in, cells.data(), n, channels, volume, value, data_of<T>(dense));
    } else {
      scatter_any(in, cells.data(), n, channels, volume, value, distinct, data_of<T>(dense));
    }
  });
  return {dense, 0};
}

}  // namespace
}  // namespace cvc::voxels

STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def("occupancy_to_coords(Tensor occupancy, float threshold) -> Tensor");
  m.def(
      "voxels_to_dense(Tensor feats, Tensor coords, int batch, int x, int y, int z, float fill, bool assume_unique)"
      " -> (Tensor, int)");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("occupancy_to_coords", TORCH_BOX(&cvc::voxels::occupancy_to_coords));
  m.impl("voxels_to_dense", TORCH_BOX(&cvc::voxels::voxels_to_dense));
}
