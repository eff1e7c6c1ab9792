// Dense volumes ↔ sparse voxels. Features are moved, never computed with: kernels know element sizes, not types.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <bit>
#include <tuple>

#include "voxels/fill.h"
#include "voxels/keys.h"
#include "voxels/tasks.h"

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

// --- voxels in a volume ----------------------------------------------------------------------------------------------

struct Volume {
  uint32_t size[4];  // batch, x, y, z

  int64_t cells() const { return int64_t{size[1]} * size[2] * size[3]; }
  bool holds(const int32_t* c) const {
    return static_cast<uint32_t>(c[0]) < size[0] && static_cast<uint32_t>(c[1]) < size[1] &&
           static_cast<uint32_t>(c[2]) < size[2] && static_cast<uint32_t>(c[3]) < size[3];
  }
  // The place of a voxel among the cells of all volumes.
  int64_t cell(const int32_t* c) const { return ((int64_t{c[0]} * size[1] + c[1]) * size[2] + c[2]) * size[3] + c[3]; }
};

struct Order {
  bool inside = true, ascending = true;  // ascending: strictly, so that no voxel is there twice
};

Order order_of(const int32_t* coords, int64_t n, const Volume& volume, int64_t* cells) {
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
bool any_twice(const int64_t* cells, int64_t n, int64_t size) {
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

// Some voxels: where the first channel of each is, and the lines of the cache that these lie in.
template <class T>
struct Voxels {
  static constexpr int64_t kMost = 512;

  void find(const T* dense, const int64_t* cells, int64_t n, int64_t channels, int64_t size) {
    count = std::min(kMost, n);
    lines = 0;
    uintptr_t before = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (static_cast<uint64_t>(cells[i] - first_) >= static_cast<uint64_t>(size)) first_ = cells[i] / size * size;
      place[i] = line[lines] = dense + first_ * channels + (cells[i] - first_);
      const uintptr_t own = reinterpret_cast<uintptr_t>(place[i]) / 64;
      lines += own != before;  // else the next one takes its place
      before = own;
    }
  }
  // Into the second level: it waits for more lines at a time than the first.
  void fetch(int64_t k, int64_t offset) const { __builtin_prefetch(line[k] + offset, 0, 2); }

  const T *place[kMost], *line[kMost];
  int64_t count, lines;

 private:
  int64_t first_ = 0;  // cell of the volume that the last voxel was in
};

// A channel's cells lie all over its volume, a few to a line of the cache: while some voxels are read, the lines of the
// next ones are fetched, channel by channel.
template <class T>
void gather_cells(const T* dense, const int64_t* cells, int64_t n, int64_t channels, const Volume& volume, T* out) {
  constexpr int64_t kStep = 4;
  const int64_t size = volume.cells();
  for_each_range(n, [&](int64_t begin, int64_t end) {
    Voxels<T> places[2];
    places[0].find(dense, cells + begin, end - begin, channels, size);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < places[0].lines; ++k) places[0].fetch(k, c * size);
    for (int64_t from = begin, turn = 0; from < end; ++turn) {
      const Voxels<T>& now = places[turn % 2];
      Voxels<T>& next = places[1 - turn % 2];
      const int64_t after = from + now.count;
      next.find(dense, cells + after, end - after, channels, size);
      const int64_t fetches = (next.lines * kStep + now.count - 1) / now.count;  // a step
      for (int64_t c = 0; c < channels; ++c) {
        T* const to = out + from * channels + c;
        int64_t k = 0;
        for (int64_t i = 0; i < now.count; i += kStep) {
          for (const int64_t last = std::min(k + fetches, next.lines); k < last; ++k) next.fetch(k, c * size);
          for (int64_t j = i; j < std::min(i + kStep, now.count); ++j) to[j * channels] = now.place[j][c * size];
        }
      }
      from = after;
    }
  });
}

// Calls f with a number as wide as the elements.
template <class F>
auto by_width(const Tensor& tensor, const F& f) {
  switch (tensor.element_size()) {
    case 2: return f(uint16_t{});
    case 8: return f(uint64_t{});
    default: return f(uint32_t{});
  }
}

Volume volume_of(int64_t batch, int64_t x, int64_t y, int64_t z) {
  return {{static_cast<uint32_t>(batch), static_cast<uint32_t>(x), static_cast<uint32_t>(y), static_cast<uint32_t>(z)}};
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

std::tuple<Tensor, int64_t> voxels_from_dense(Tensor dense, Tensor coords, bool assume_unique) {
  const int64_t n = coords.size(0), channels = dense.size(1);
  const Volume volume = volume_of(dense.size(0), dense.size(2), dense.size(3), dense.size(4));
  Buffer<int64_t> cells(n);
  const Order order = order_of(static_cast<const int32_t*>(coords.const_data_ptr()), n, volume, cells.data());
  Tensor nothing = torch::stable::new_empty(dense, {0}, dense.scalar_type());
  if (!order.inside) return {nothing, kOutOfRange};
  if (!assume_unique && !order.ascending && any_twice(cells.data(), n, dense.size(0) * volume.cells()))
    return {nothing, kDuplicate};
  Tensor feats = new_tensor(dense, {n, channels}, dense.scalar_type());
  by_width(dense, [&](auto zero) {
    using T = decltype(zero);
    gather_cells(static_cast<const T*>(dense.const_data_ptr()), cells.data(), n, channels, volume, data_of<T>(feats));
  });
  return {feats, 0};
}

}  // namespace
}  // namespace cvc::voxels

STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def("occupancy_to_coords(Tensor occupancy, float threshold) -> Tensor");
  m.def(
      "voxels_to_dense(Tensor feats, Tensor coords, int batch, int x, int y, int z, float fill, bool assume_unique)"
      " -> (Tensor, int)");
  m.def("voxels_from_dense(Tensor dense, Tensor coords, bool assume_unique) -> (Tensor, int)");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("occupancy_to_coords", TORCH_BOX(&cvc::voxels::occupancy_to_coords));
  m.impl("voxels_to_dense", TORCH_BOX(&cvc::voxels::voxels_to_dense));
  m.impl("voxels_from_dense", TORCH_BOX(&cvc::voxels::voxels_from_dense));
}
