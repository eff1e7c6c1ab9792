// What the epipolar kernels of every instruction set are handed, and their tables. No torch in here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cvc::epipolar {

enum class Activation : int64_t { identity = 0, relu = 1, gelu = 2, silu = 3 };

// Channels are worked off in blocks: a block of all the corners that a tile of pixels reads stays in the cache, and the
// tasks of the backward own blocks.
constexpr int64_t kBlock = 64;

constexpr int64_t block_count(int64_t channels) { return (channels + kBlock - 1) / kBlock; }

// The cameras, the depth of every query pixel, and the size of the neighbours' maps. Strides count elements.
template <class T>
struct Geometry {
  int64_t batch, queries, height, width, points, slots, map_height, map_width;
  int64_t first_row;    // where in the image the query's rows begin
  const int64_t* band;  // [N, 2] first and last + 1 of the rows of a slot's map that exist; null: all of them
  const T* depth;
  int64_t depth_stride[4];  // b, q, i, j
  const T* jitter;          // null: the middle of each stratum
  int64_t jitter_stride[5];
  const T* rays;        // [B, Q, 2, 3]
  const T* projection;  // [B, Q, N, 3, 4]
  T radius;
  bool along_ray, ortho, mask;

  int64_t band_begin(int64_t slot) const { return band ? band[2 * slot] : 0; }
  int64_t band_end(int64_t slot) const { return band ? band[2 * slot + 1] : map_height; }
  int64_t images() const { return batch * queries; }
  int64_t pixels() const { return height * width; }
};

// Pixels are worked off in tiles of neighbours, which read neighbouring corners. The shape depends on the problem
// alone.
struct Tiling {
  int64_t rows, columns;  // of a tile
  int64_t down, across;   // tiles in an image

  int64_t per_image() const { return down * across; }
};

// Rows of channels for every query pixel and head.
template <class T>
struct Rows {
  const T* data;
  int64_t stride[6];  // b, q, i, j, head, channel
};

// All neighbours' maps; a channel is one element.
template <class T>
struct Maps {
  T* data;
  int64_t stride[5];  // b, q, n, y, x
};

template <class T>
struct Attention {
  Geometry<T> geometry;
  Tiling tiling;
  int64_t heads, channels;
  Activation activation;
  T scale;
  Rows<T> query, grad_out;  // grad_out.data is null in the forward
  Maps<const T> maps;
  const T* bias;  // [Ch]
};

// A share of the backward: channels [first_block, last_block) · kBlock of one image. Nobody else writes what it writes.
template <class T>
struct Share {
  int64_t image, first_block, last_block;
  const T* weight;      // [H·W, heads, P] of the image: the attention
  const T* grad_score;  // [H·W, heads, P]: the gradient of <query, h>
  T* grad_query;        // [H·W, heads, Ch], or null
  Maps<T> grad_maps;    // added to; data may be null
  double* grad_bias;    // [Ch], added to; or null
  T* grad_coordinate;   // [blocks, H·W, P, N, 2], or null
};

template <class T>
struct AttentionKernels {
  // Bytes of scratch that a thread needs for any of the kernels below.
  size_t (*scratch_bytes)(const Attention<T>&);
  // Tiles [begin, end) of all images: out [B, Q, H, W, heads, Ch] and lse [B, Q, H, W, heads].
  void (*forward)(const Attention<T>&, int64_t begin, int64_t end, T* out, T* lse, unsigned char* scratch);
  // Adds <query, h> to score [B, Q, H, W, heads, P], -inf where the softmax does not have the sample, and
  // <grad_out, h> to grad_weight of the same shape, which may be null.
  void (*dots)(const Attention<T>&, int64_t begin, int64_t end, T* score, T* grad_weight, unsigned char* scratch);
  // out = sum over the samples of weight · h.
  void (*context)(const Attention<T>&, int64_t begin, int64_t end, const T* weight, T* out, unsigned char* scratch);
  void (*backward)(const Attention<T>&, const Share<T>&, unsigned char* scratch);
};

// Gradients by coordinates [blocks, H·W, P, N, 2] of one image, for its tiles [begin, end): by the depth, and per tile
// the sums [6 + 12 N] by rays and projection.
template <class T>
using CoordinateKernel = void (*)(const Geometry<T>&, const Tiling&, int64_t image, int64_t begin, int64_t end,
                                  const T* grad_coordinate, int64_t blocks, T* grad_depth, double* sums);

// The rows [first, last + 1) of every slot's map that the tiles [begin, end) of all images read, [tiles, N, 2].
template <class T>
using ReachKernel = void (*)(const Geometry<T>&, const Tiling&, int64_t begin, int64_t end, int64_t* rows);

struct EpipolarKernels {
  AttentionKernels<float> attention_float;
  AttentionKernels<double> attention_double;
  CoordinateKernel<float> coordinates_float;
  CoordinateKernel<double> coordinates_double;
  ReachKernel<float> reach_float;
  ReachKernel<double> reach_double;

  template <class T>
  const AttentionKernels<T>& attention() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return attention_float;
    } else {
      return attention_double;
    }
  }
  template <class T>
  CoordinateKernel<T> coordinates() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return coordinates_float;
    } else {
      return coordinates_double;
    }
  }
  template <class T>
  ReachKernel<T> reach() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return reach_float;
    } else {
      return reach_double;
    }
  }
};

// --- sampling
// ---------------------------------------------------------------------------------------------------------

template <class T>
struct Sampling {
  Geometry<T> geometry;
  Tiling tiling;
  int64_t channels;
  const int64_t* source;  // [Q, N]: the view that a slot reads; the maps' stride by q is 0, that by n is a view's
  Maps<const T> maps;
  struct {
    const T* data;
    int64_t stride[7];  // b, q, i, j, k, n, channel
  } grad;
};

// A share of the backward: blocks of channels of all reference views of one batch element, which may read one view.
template <class T>
struct SampleShare {
  int64_t batch, first_block, last_block, blocks;
  Maps<T> grad_maps;   // strides as those of the maps; added to; data may be null
  T* grad_coordinate;  // [Q, blocks, H·W, P, N, 2], or null

  int64_t first_coordinate(const Geometry<T>& g, int64_t q, int64_t block) const {
    return (q * blocks + block) * g.pixels() * g.points * g.slots;
  }
};

template <class T>
struct SamplingKernels {
  size_t (*scratch_bytes)(const Sampling<T>&);
  // Tiles [begin, end): out [B, Q, H, W, P, N, C].
  void (*forward)(const Sampling<T>&, int64_t begin, int64_t end, T* out, unsigned char* scratch);
  void (*backward)(const Sampling<T>&, const SampleShare<T>&, unsigned char* scratch);
};

struct SamplingTable {
  SamplingKernels<float> of_float;
  SamplingKernels<double> of_double;

  template <class T>
  const SamplingKernels<T>& kernels() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return of_float;
    } else {
      return of_double;
    }
  }
};

}  // namespace cvc::epipolar
