// Epipolar attention, tile by tile. Per sample the corners of all neighbours are added up, block of channels by block:
// within a block, sample k of all pixels of the tile comes before sample k + 1, because the corners of neighbouring
// pixels are the same ones.
#include "common/isa.h"
#include "epipolar/job.h"
#include "epipolar/taps.h"
// after taps.h, whose tiles they use
#include "epipolar/places.h"
#include "epipolar/rows.h"

namespace cvc::epipolar {
namespace {

template <class T>
inline int64_t image_of(const Attention<T>& job, const Tile& tile) {
  return tile.b * job.geometry.queries + tile.q;
}

// The pixel's place among those of all images.
template <class T>
inline int64_t pixel_of(const Geometry<T>& g, const Tile& tile, int64_t p) {
  return ((tile.b * g.queries + tile.q) * g.height + tile.i(p)) * g.width + tile.j(p);
}

inline int64_t block_channels(int64_t channels, int64_t block) {
  const int64_t left = channels - block * kBlock;
  return left < kBlock ? left : kBlock;
}

// Scratch of one thread.
template <class T, bool kBackward>
struct Scratch {
  Arena arena;
  Taps<T, kBackward> taps;
  T *bias, *query, *grad_out, *row, *hidden, *grad_query, *grad_bias, *weight;
  Vec<T>* score;
  Vec<T>* grad_weight;

  Scratch(const Attention<T>& job, unsigned char* base)
      : arena(base), taps(job.geometry, job.tiling.rows * job.tiling.columns, arena) {
    const int64_t pixels = job.tiling.rows * job.tiling.columns, samples = pixels * job.geometry.points;
    query = arena.take<T>(pixels * job.heads * kBlock);
    grad_out = arena.take<T>(pixels * job.heads * kBlock);
    row = arena.take<T>(kBlock);
    if constexpr (kBackward) {
      grad_query = arena.take<T>(pixels * job.heads * kBlock);
      grad_bias = arena.take<T>(kBlock);
    } else {
      hidden = arena.take<T>(samples * padded<T>(job.channels));
      score = arena.take<Vec<T>>(samples * job.heads);
      grad_weight = arena.take<Vec<T>>(samples * job.heads);
      weight = arena.take<T>(job.geometry.points);
    }
  }
};

template <class T>
size_t scratch_bytes(const Attention<T>& job) {
  const size_t forward = Scratch<T, false>(job, nullptr).arena.used(),
               backward = Scratch<T, true>(job, nullptr).arena.used();
  return forward < backward ? backward : forward;
}

// h of one sample and block: corners gathered, activation applied.
template <Activation kActivation, class T, class S>
inline void hidden_row(const Attention<T>& job, const S& scratch, int64_t sample, int64_t first, int64_t channels,
                       T* row) {
  const auto& taps = scratch.taps;
  gather(job.bias + first, job.maps.data + first, taps.source + sample * taps.per_sample,
         taps.weight + sample * taps.per_sample, taps.count[sample], channels, row);
  if constexpr (kActivation != Activation::identity)
    for (int64_t c = 0; c < channels; c += kWidth<T>)
      store(row + c, activate<kActivation, false, T>(load<Vec<T>>(row + c), nullptr));
}

// Writes the first `channels` elements of a sum of rows.
template <class T>
inline void weighted_sum(const T* weight, const T* rows, int64_t count, int64_t stride, int64_t channels, T* out) {
  using V = Vec<T>;
  for (int64_t c = 0; c < channels; c += kWidth<T>) {
    V sum{};
    for (int64_t k = 0; k < count; ++k)
      if (weight[k] != T(0)) sum += weight[k] * load<V>(rows + k * stride + c);
    if (c + kWidth<T> <= channels) {
      store(out + c, sum);
    } else {
      for (int64_t l = 0; c + l < channels; ++l) out[c + l] = sum[l];
    }
  }
}

template <Activation kActivation, class T>
void forward_tile(const Attention<T>& job, const Tile& tile, T* out, T* lse, Scratch<T, false>& scratch) {
  const int64_t points = job.geometry.points, heads = job.heads, stride = padded<T>(job.channels);
  auto& taps = scratch.taps;
  taps.build(job.geometry, tile, job.maps.stride, nullptr);
  for (int64_t s = 0; s < tile.pixels * points * heads; ++s) scratch.score[s] = Vec<T>{};
  for (int64_t first = 0; first < job.channels; first += kBlock) {
    const int64_t channels = block_channels(job.channels, first / kBlock);
    const RowBlock<T> query(job.query, tile, heads, first, channels, scratch.query);
    for (int64_t k = 0; k < points; ++k)
      for (int64_t p = 0; p < tile.pixels; ++p) {
        const int64_t sample = p * points + k;
        if (!taps.kept[sample]) continue;
        T* row = scratch.hidden + sample * stride + first;
        hidden_row<kActivation>(job, scratch, sample, first, channels, row);
        for (int64_t h = 0; h < heads; ++h)
          scratch.score[sample * heads + h] += dot(row, query.row(p, h), padded<T>(channels));
      }
  }
  for (int64_t p = 0; p < tile.pixels; ++p) {
    const int64_t pixel = pixel_of(job.geometry, tile, p);
    for (int64_t h = 0; h < heads; ++h) {
      T* weight = scratch.weight;
      T highest = -static_cast<T>(__builtin_inf()), sum = 0;
      for (int64_t k = 0; k < points; ++k) {
        if (!taps.kept[p * points + k]) continue;
        weight[k] = job.scale * sum_of<T>(scratch.score[(p * points + k) * heads + h]);
        if (!(weight[k] <= highest)) highest = weight[k];
      }
      for (int64_t k = 0; k < points; ++k) {
        if (!taps.kept[p * points + k]) {
          weight[k] = 0;
          continue;
        }
        weight[k] = exp_of(weight[k] - highest);
        sum += weight[k];
      }
      for (int64_t k = 0; k < points; ++k)
        if (taps.kept[p * points + k]) weight[k] /= sum;
      lse[pixel * heads + h] = highest + log_of(sum);  // -inf where no sample is kept
      weighted_sum(weight, scratch.hidden + p * points * stride, points, stride, job.channels,
                   out + (pixel * heads + h) * job.channels);
    }
  }
}

template <Activation kActivation, class T>
void dots_tile(const Attention<T>& job, const Tile& tile, T* score, T* grad_weight, Scratch<T, false>& scratch) {
  const int64_t points = job.geometry.points, heads = job.heads;
  auto& taps = scratch.taps;
  taps.build(job.geometry, tile, job.maps.stride, nullptr);
  for (int64_t s = 0; s < tile.pixels * points * heads; ++s) scratch.score[s] = scratch.grad_weight[s] = Vec<T>{};
  for (int64_t first = 0; first < job.channels; first += kBlock) {
    const int64_t channels = block_channels(job.channels, first / kBlock), whole = padded<T>(channels);
    const RowBlock<T> query(job.query, tile, heads, first, channels, scratch.query);
    const RowBlock<T> grad_out(grad_weight ? job.grad_out : job.query, tile, heads, first, channels, scratch.grad_out);
    for (int64_t k = 0; k < points; ++k)
      for (int64_t p = 0; p < tile.pixels; ++p) {
        const int64_t sample = p * points + k;
        if (!taps.kept[sample]) continue;
        hidden_row<kActivation>(job, scratch, sample, first, channels, scratch.row);
        for (int64_t h = 0; h < heads; ++h) {
          scratch.score[sample * heads + h] += dot(scratch.row, query.row(p, h), whole);
          if (grad_weight) scratch.grad_weight[sample * heads + h] += dot(scratch.row, grad_out.row(p, h), whole);
        }
      }
  }
  for (int64_t p = 0; p < tile.pixels; ++p) {
    const int64_t pixel = pixel_of(job.geometry, tile, p);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t k = 0; k < points; ++k) {
        const int64_t to = (pixel * heads + h) * points + k, from = (p * points + k) * heads + h;
        if (!taps.kept[p * points + k]) {
          score[to] = -static_cast<T>(__builtin_inf());
          continue;
        }
        score[to] += sum_of<T>(scratch.score[from]);
        if (grad_weight) grad_weight[to] += sum_of<T>(scratch.grad_weight[from]);
      }
  }
}

template <Activation kActivation, class T>
void context_tile(const Attention<T>& job, const Tile& tile, const T* weight, T* out, Scratch<T, false>& scratch) {
  const int64_t points = job.geometry.points, heads = job.heads, stride = padded<T>(job.channels);
  auto& taps = scratch.taps;
  taps.build(job.geometry, tile, job.maps.stride, nullptr);
  for (int64_t first = 0; first < job.channels; first += kBlock) {
    const int64_t channels = block_channels(job.channels, first / kBlock);
    for (int64_t k = 0; k < points; ++k)
      for (int64_t p = 0; p < tile.pixels; ++p)
        if (taps.kept[p * points + k])
          hidden_row<kActivation>(job, scratch, p * points + k, first, channels,
                                  scratch.hidden + (p * points + k) * stride + first);
  }
  for (int64_t p = 0; p < tile.pixels; ++p) {
    const int64_t pixel = pixel_of(job.geometry, tile, p);
    for (int64_t h = 0; h < heads; ++h)
      weighted_sum(weight + (pixel * heads + h) * points, scratch.hidden + p * points * stride, points, stride,
                   job.channels, out + (pixel * heads + h) * job.channels);
  }
}

// The gradient of one sample's sum before the activation, in place of that sum; adds to the query's and the bias's.
template <Activation kActivation, class T>
inline void grad_row(const Attention<T>& job, const Share<T>& share, const RowBlock<T>& query,
                     const RowBlock<T>& grad_out, int64_t p, int64_t k, int64_t pixel, int64_t whole,
                     Scratch<T, true>& scratch) {
  using V = Vec<T>;
  const int64_t points = job.geometry.points, heads = job.heads;
  const T* weight = share.weight + pixel * heads * points + k;
  const T* grad_score = share.grad_score + pixel * heads * points + k;
  T* grad_query = scratch.grad_query + p * heads * kBlock;
  for (int64_t c = 0; c < whole; c += kWidth<T>) {
    V slope, grad{};
    const V hidden = activate<kActivation, true, T>(load<V>(scratch.row + c), &slope);
    for (int64_t h = 0; h < heads; ++h) {
      const T a = weight[h * points], s = grad_score[h * points];
      grad += a * load<V>(grad_out.row(p, h) + c) + s * load<V>(query.row(p, h) + c);
      store(grad_query + h * kBlock + c, load<V>(grad_query + h * kBlock + c) + s * hidden);
    }
    grad *= slope;
    store(scratch.row + c, grad);
    store(scratch.grad_bias + c, load<V>(scratch.grad_bias + c) + grad);
  }
}

// Hands the gradient of a sample to the maps, and gathers that by its coordinates.
template <bool kMaps, bool kCoordinates, class T>
inline void spread(const Attention<T>& job, const Share<T>& share, int64_t sample, int64_t first, int64_t channels,
                   T* grad_coordinate, const Scratch<T, true>& scratch) {
  const auto& taps = scratch.taps;
  int64_t t = sample * taps.per_sample;
  if constexpr (!kCoordinates) {
    for (const int64_t end = t + taps.count[sample]; t < end; ++t)
      scatter<T, true, false>(scratch.row, nullptr, share.grad_maps.data + taps.target[t] + first, taps.weight[t],
                              channels);
  } else {
    for (int64_t n = 0; n < job.geometry.slots; ++n) {
      Vec<T> by_x{}, by_y{};
      for (const int64_t end = t + taps.slot_count[sample * job.geometry.slots + n]; t < end; ++t) {
        T* grad = kMaps ? share.grad_maps.data + taps.target[t] + first : nullptr;
        const Vec<T> product = scatter<T, kMaps, true>(scratch.row, job.maps.data + taps.source[t] + first, grad,
                                                       taps.weight[t], channels);
        by_x += taps.slope_x[t] * product, by_y += taps.slope_y[t] * product;
      }
      grad_coordinate[2 * n] = sum_of<T>(by_x), grad_coordinate[2 * n + 1] = sum_of<T>(by_y);
    }
  }
}

template <Activation kActivation, bool kMaps, bool kCoordinates, class T>
void backward_tile(const Attention<T>& job, const Share<T>& share, const Tile& tile, Scratch<T, true>& scratch) {
  const int64_t points = job.geometry.points, heads = job.heads, slots = job.geometry.slots;
  const int64_t image_pixels = job.geometry.pixels(), first_pixel = share.image * image_pixels;
  auto& taps = scratch.taps;
  taps.build(job.geometry, tile, job.maps.stride, share.grad_maps.stride);
  for (int64_t block = share.first_block; block < share.last_block; ++block) {
    const int64_t first = block * kBlock, channels = block_channels(job.channels, block), whole = padded<T>(channels);
    const RowBlock<T> query(job.query, tile, heads, first, channels, scratch.query);
    const RowBlock<T> grad_out(job.grad_out, tile, heads, first, channels, scratch.grad_out);
    for (int64_t c = 0; c < tile.pixels * heads * kBlock; ++c) scratch.grad_query[c] = 0;
    for (int64_t c = 0; c < kBlock; ++c) scratch.grad_bias[c] = 0;
    for (int64_t k = 0; k < points; ++k)
      for (int64_t p = 0; p < tile.pixels; ++p) {
        const int64_t sample = p * points + k, pixel = pixel_of(job.geometry, tile, p) - first_pixel;
        T* coordinate = nullptr;
        if constexpr (kCoordinates)
          coordinate = share.grad_coordinate + ((block * image_pixels + pixel) * points + k) * slots * 2;
        if (!taps.kept[sample]) {
          if constexpr (kCoordinates)
            for (int64_t n = 0; n < 2 * slots; ++n) coordinate[n] = 0;
          continue;
        }
        gather(job.bias + first, job.maps.data + first, taps.source + sample * taps.per_sample,
               taps.weight + sample * taps.per_sample, taps.count[sample], channels, scratch.row);
        grad_row<kActivation>(job, share, query, grad_out, p, k, pixel, whole, scratch);
        if constexpr (kMaps || kCoordinates)
          spread<kMaps, kCoordinates>(job, share, sample, first, channels, coordinate, scratch);
      }
    if (share.grad_query)
      for (int64_t p = 0; p < tile.pixels; ++p)
        for (int64_t h = 0; h < heads; ++h)
          __builtin_memcpy(
              share.grad_query + ((pixel_of(job.geometry, tile, p) - first_pixel) * heads + h) * job.channels + first,
              scratch.grad_query + (p * heads + h) * kBlock, channels * sizeof(T));
    if (share.grad_bias)
      for (int64_t c = 0; c < channels; ++c) share.grad_bias[first + c] += scratch.grad_bias[c];
  }
}

// Calls f<activation>() for the job's activation.
template <class T, class F>
inline void with_activation(const Attention<T>& job, F f) {
  switch (job.activation) {
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    case Activation::silu: return f.template operator()<Activation::silu>();
    default: return f.template operator()<Activation::identity>();
  }
}

template <class T>
void forward(const Attention<T>& job, int64_t begin, int64_t end, T* out, T* lse, unsigned char* base) {
  Scratch<T, false> scratch(job, base);
  with_activation(job, [&]<Activation kActivation>() {
    for (int64_t t = begin; t < end; ++t)
      forward_tile<kActivation>(job, tile_at(job.geometry, job.tiling, t), out, lse, scratch);
  });
}

template <class T>
void dots(const Attention<T>& job, int64_t begin, int64_t end, T* score, T* grad_weight, unsigned char* base) {
  Scratch<T, false> scratch(job, base);
  with_activation(job, [&]<Activation kActivation>() {
    for (int64_t t = begin; t < end; ++t)
      dots_tile<kActivation>(job, tile_at(job.geometry, job.tiling, t), score, grad_weight, scratch);
  });
}

template <class T>
void context(const Attention<T>& job, int64_t begin, int64_t end, const T* weight, T* out, unsigned char* base) {
  Scratch<T, false> scratch(job, base);
  with_activation(job, [&]<Activation kActivation>() {
    for (int64_t t = begin; t < end; ++t)
      context_tile<kActivation>(job, tile_at(job.geometry, job.tiling, t), weight, out, scratch);
  });
}

template <class T>
void backward(const Attention<T>& job, const Share<T>& share, unsigned char* base) {
  Scratch<T, true> scratch(job, base);
  const bool maps = share.grad_maps.data, coordinates = share.grad_coordinate;
  const int64_t begin = share.image * job.tiling.per_image(), end = begin + job.tiling.per_image();
  with_activation(job, [&]<Activation kActivation>() {
    const auto run =
        maps ? (coordinates ? backward_tile<kActivation, true, true, T> : backward_tile<kActivation, true, false, T>)
             : (coordinates ? backward_tile<kActivation, false, true, T> : backward_tile<kActivation, false, false, T>);
    for (int64_t t = begin; t < end; ++t) run(job, share, tile_at(job.geometry, job.tiling, t), scratch);
  });
}

constexpr EpipolarKernels kKernels = {
    {scratch_bytes<float>, forward<float>, dots<float>, context<float>, backward<float>},
    {scratch_bytes<double>, forward<double>, dots<double>, context<double>, backward<double>},
    coordinates<float>,
    coordinates<double>,
    reach<float>,
    reach<double>,
};

}  // namespace

const EpipolarKernels& CVC_ISA_NAME(epipolar_kernels)() { return kKernels; }

}  // namespace cvc::epipolar
