// The attention's kernels on torch's threads: what the operators of attention.cpp and walk.cpp are made of.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "epipolar/tensors.h"

namespace cvc::epipolar {

inline const EpipolarKernels& kernels() { return CVC_ISA_PICK(epipolar_kernels)(); }

// Everything that the kernels read, for as long as they run. `rows` is a query, or of its shape.
template <class T>
struct Prepared {
  Cameras<T> cameras;
  ChannelsLast<T> maps;
  Tensor bias;
  Attention<T> job;

  Prepared(Cameras<T> cameras_in, int64_t heads, const Tensor& maps_in, const Tensor& bias_in, int64_t activation)
      : cameras(cameras_in), maps(checked(maps_in, cameras.geometry)), bias(torch::stable::contiguous(bias_in)), job{} {
    STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == maps_in.size(5) && bias.scalar_type() == scalar_type<T>(),
                    "epipolar: bias does not fit maps");
    job.geometry = cameras.geometry;
    job.geometry.map_height = maps_in.size(3), job.geometry.map_width = maps_in.size(4);
    job.heads = heads, job.channels = maps_in.size(5);
    job.tiling = tiling(job.geometry, job.channels);
    job.activation = static_cast<Activation>(activation);
    job.maps = maps.view;
    job.bias = elements<T>(bias);
  }

  // Only a window of the images is here: rows of the query from first_row on, and rows [band[2n], band[2n + 1]) of
  // slot n's map, which has map_height; all of them when `band`, which must outlive this, is empty.
  void restrict(int64_t first_row, const std::vector<int64_t>& band, int64_t map_height) {
    Geometry<T>& g = job.geometry;
    const int64_t here = g.map_height;
    bool fits = first_row >= 0 && (band.empty() ? here == map_height : band.size() == 2 * static_cast<size_t>(g.slots));
    for (size_t n = 0; fits && n < band.size(); n += 2)
      fits = 0 <= band[n] && band[n] <= band[n + 1] && band[n + 1] <= map_height && band[n + 1] - band[n] <= here;
    STD_TORCH_CHECK(fits, "epipolar: the band does not fit the maps");
    g.first_row = first_row, g.map_height = map_height, g.band = band.empty() ? nullptr : band.data();
  }

  // Rows of channels [B, Q, H, W, heads, Ch], in place.
  Rows<T> rows(const Tensor& t) const {
    const Geometry<T>& g = job.geometry;
    const bool fits = t.dim() == 6 && t.scalar_type() == scalar_type<T>() && t.size(0) == g.batch &&
                      t.size(1) == g.queries && t.size(2) == g.height && t.size(3) == g.width &&
                      t.size(4) == job.heads && t.size(5) == job.channels;
    STD_TORCH_CHECK(fits, "epipolar: query or gradient does not fit maps and depth");
    Rows<T> rows;
    rows.data = elements<T>(t), copy_strides(t, rows.stride);
    if (t.size(5) == 1) rows.stride[5] = 1;
    return rows;
  }

  // Elements of one weight per pixel, head and sample of an image.
  int64_t weights() const { return job.geometry.pixels() * job.heads * job.geometry.points; }
  int64_t blocks() const { return block_count(job.channels); }
  int64_t tiles() const { return job.geometry.images() * job.tiling.per_image(); }

  // f(begin, end, scratch) over n tasks.
  template <class F>
  void run(int64_t n, const F& f) const {
    const size_t bytes = kernels().attention<T>().scratch_bytes(job);
    parallel(n, [&](int64_t begin, int64_t end) {
      const Buffer<unsigned char> scratch(static_cast<int64_t>(bytes));
      f(begin, end, scratch.data());
    });
  }

  void forward(T* out, T* lse) const {
    run(tiles(), [&](int64_t begin, int64_t end, unsigned char* scratch) {
      kernels().attention<T>().forward(job, begin, end, out, lse, scratch);
    });
  }

  void dots(T* score, T* grad_weight) const {
    run(tiles(), [&](int64_t begin, int64_t end, unsigned char* scratch) {
      kernels().attention<T>().dots(job, begin, end, score, grad_weight, scratch);
    });
  }

 private:
  static const Tensor& checked(const Tensor& maps, const Geometry<T>& g) {
    const bool fits = maps.dim() == 6 && maps.scalar_type() == scalar_type<T>() && maps.size(0) == g.batch &&
                      maps.size(1) == g.queries && maps.size(2) == g.slots;
    STD_TORCH_CHECK(fits, "epipolar: maps do not fit depth and projection");
    return maps;
  }
};

// Where the backward's gradients go, over all images; null where one is not wanted.
template <class T>
struct Targets {
  T* query = nullptr;  // [B·Q, H·W, heads, Ch]
  Maps<T> maps{};      // added to
  T* bias = nullptr;   // [Ch]
};

// The backward from the attention and the gradient of <query, h> on. With `coordinates`, calls
// coordinates(image, grad_coordinate [blocks, H·W, P, N, 2]) after each image.
template <class T, class F>
void backward_from_scores(const Prepared<T>& prepared, const T* weight, const T* grad_score, const Targets<T>& targets,
                          bool with_coordinates, const F& coordinates) {
  const Attention<T>& job = prepared.job;
  const Geometry<T>& g = job.geometry;
  const int64_t blocks = prepared.blocks();
  Buffer<double> grad_bias(targets.bias ? g.images() * job.channels : 0);
  std::fill(grad_bias.data(), grad_bias.data() + grad_bias.size(), 0.0);
  // Gradients by coordinates are kept block by block; for only as many images at once as keep the threads busy.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t group = with_coordinates ? (threads + blocks - 1) / blocks : g.images();
  const int64_t per_image = blocks * g.pixels() * g.points * g.slots * 2;
  Buffer<T> grad_coordinate(with_coordinates ? min(group, g.images()) * per_image : 0);
  for (int64_t first = 0; first < g.images(); first += group) {
    const int64_t images = min(group, g.images() - first);
    prepared.run(images * blocks, [&](int64_t begin, int64_t end, unsigned char* scratch) {
      for (int64_t task = begin; task < end;) {
        const int64_t local = task / blocks, image = first + local, last = min(end, (local + 1) * blocks);
        Share<T> share{};
        share.image = image, share.first_block = task - local * blocks, share.last_block = last - local * blocks;
        share.weight = weight + image * prepared.weights(), share.grad_score = grad_score + image * prepared.weights();
        if (targets.query) share.grad_query = targets.query + image * g.pixels() * job.heads * job.channels;
        share.grad_maps = targets.maps;
        if (targets.bias) share.grad_bias = grad_bias.data() + image * job.channels;
        if (with_coordinates) share.grad_coordinate = grad_coordinate.data() + local * per_image;
        kernels().attention<T>().backward(job, share, scratch);
        task = last;
      }
    });
    if (with_coordinates)
      for (int64_t i = 0; i < images; ++i) coordinates(first + i, grad_coordinate.data() + i * per_image);
  }
  if (!targets.bias) return;
  for (int64_t c = 0; c < job.channels; ++c) {
    double sum = 0;
    for (int64_t image = 0; image < g.images(); ++image) sum += grad_bias[image * job.channels + c];
    targets.bias[c] = static_cast<T>(sum);
  }
}

// The gradients by depth and cameras of one image from those by its coordinates. Sums run over the tiles in order, so
// that they do not depend on the threads.
template <class T>
void chain_coordinates(const Geometry<T>& g, const Tiling& tiling, int64_t image, const T* grad_coordinate,
                       int64_t blocks, T* grad_depth, T* grad_rays, T* grad_projection) {
  const int64_t sums = 6 + 12 * g.slots;
  Buffer<double> per_tile(tiling.per_image() * sums);
  std::fill(per_tile.data(), per_tile.data() + per_tile.size(), 0.0);
  parallel(tiling.per_image(), [&](int64_t begin, int64_t end) {
    kernels().coordinates<T>()(g, tiling, image, begin, end, grad_coordinate, blocks, grad_depth + image * g.pixels(),
                               per_tile.data());
  });
  for (int64_t s = 0; s < sums; ++s) {
    double total = 0;
    for (int64_t t = 0; t < tiling.per_image(); ++t) total += per_tile[t * sums + s];
    T* to = s < 6 ? grad_rays + image * 6 + s : grad_projection + image * 12 * g.slots + (s - 6);
    *to = static_cast<T>(total);
  }
}

template <class T>
Maps<T> maps_of(Tensor& t) {
  Maps<T> maps{};
  maps.data = elements<T>(t);
  for (int d = 0; d < 5; ++d) maps.stride[d] = t.stride(d);
  return maps;
}

}  // namespace cvc::epipolar
