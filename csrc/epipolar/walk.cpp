// The attention in parts, for callers that hold little at a time: of the query the rows from first_row on, of the maps
// of map_height rows each slot's band (see Prepared::restrict). The products with the query, the sum over the samples
// and the backward from the scores on may be called channel block by channel block too.
#include <tuple>
#include <vector>

#include "epipolar/attention_job.h"

namespace cvc::epipolar {
namespace {

template <class T>
void check_weight(const Prepared<T>& prepared, const Tensor& t) {
  const Geometry<T>& g = prepared.job.geometry;
  const bool fits = t.dim() == 6 && t.scalar_type() == scalar_type<T>() && t.is_contiguous() &&
                    t.numel() == g.images() * prepared.weights();
  STD_TORCH_CHECK(fits, "epipolar: a weight per sample must be contiguous [B, Q, H, W, heads, P]");
}

template <class T>
T* checked_output(const Prepared<T>& prepared, Tensor& t, int64_t per_pixel) {
  const Geometry<T>& g = prepared.job.geometry;
  const bool fits =
      t.scalar_type() == scalar_type<T>() && t.is_contiguous() && t.numel() == g.images() * g.pixels() * per_pixel;
  STD_TORCH_CHECK(fits, "epipolar: out must be contiguous [B, Q, H, W, heads, Ch], lse without channels");
  return elements<T>(t);
}

// epipolar_attention into memory that exists.
void epipolar_attention_into(Tensor query, Tensor maps, Tensor bias, Tensor depth, Tensor rays, Tensor projection,
                             std::optional<Tensor> jitter, int64_t first_row, std::vector<int64_t> band,
                             int64_t map_height, double scale, int64_t num_samples, double radius, bool along_ray,
                             bool ortho, bool mask, int64_t activation, Tensor out, Tensor lse) {
  const auto run = [&]<class T>(T) {
    Prepared<T> prepared({depth, rays, projection, jitter, num_samples, radius, along_ray, ortho, mask}, query.size(4),
                         maps, bias, activation);
    prepared.restrict(first_row, band, map_height);
    prepared.job.scale = static_cast<T>(scale);
    prepared.job.query = prepared.rows(query);
    const int64_t heads = prepared.job.heads;
    prepared.forward(checked_output(prepared, out, heads * prepared.job.channels),
                     checked_output(prepared, lse, heads));
  };
  query.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

// Adds <query, h> to score, and <grad_out, h> to grad_weight.
void epipolar_scores(Tensor query, std::optional<Tensor> grad_out, Tensor maps, Tensor bias, Tensor depth, Tensor rays,
                     Tensor projection, std::optional<Tensor> jitter, int64_t first_row, std::vector<int64_t> band,
                     int64_t map_height, int64_t num_samples, double radius, bool along_ray, bool ortho, bool mask,
                     int64_t activation, Tensor score, std::optional<Tensor> grad_weight) {
  const auto run = [&]<class T>(T) {
    Prepared<T> prepared({depth, rays, projection, jitter, num_samples, radius, along_ray, ortho, mask}, query.size(4),
                         maps, bias, activation);
    prepared.restrict(first_row, band, map_height);
    prepared.job.query = prepared.rows(query);
    check_weight(prepared, score);
    T* of_weight = nullptr;
    if (grad_out && grad_weight) {
      prepared.job.grad_out = prepared.rows(*grad_out);
      check_weight(prepared, *grad_weight);
      of_weight = elements<T>(*grad_weight);
    }
    prepared.dots(elements<T>(score), of_weight);
  };
  query.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

void epipolar_context(Tensor weight, Tensor maps, Tensor bias, Tensor depth, Tensor rays, Tensor projection,
                      std::optional<Tensor> jitter, int64_t first_row, std::vector<int64_t> band, int64_t map_height,
                      int64_t num_samples, double radius, bool along_ray, bool ortho, bool mask, int64_t activation,
                      Tensor out) {
  const auto run = [&]<class T>(T) {
    Prepared<T> prepared({depth, rays, projection, jitter, num_samples, radius, along_ray, ortho, mask}, weight.size(4),
                         maps, bias, activation);
    prepared.restrict(first_row, band, map_height);
    check_weight(prepared, weight);
    T* to = checked_output(prepared, out, prepared.job.heads * prepared.job.channels);
    prepared.run(prepared.tiles(), [&](int64_t begin, int64_t end, unsigned char* scratch) {
      kernels().attention<T>().context(prepared.job, begin, end, elements<T>(std::as_const(weight)), to, scratch);
    });
  };
  weight.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

// Gives grad_query, grad_bias and the gradient of the samples' coordinates [B, Q, H, W, P, N, 2], and adds to
// grad_maps.
std::tuple<Tensor, Tensor, Tensor> epipolar_scores_backward(
    Tensor grad_out, Tensor query, Tensor weight, Tensor grad_score, Tensor maps, Tensor bias, Tensor depth,
    Tensor rays, Tensor projection, std::optional<Tensor> jitter, int64_t first_row, std::vector<int64_t> band,
    int64_t map_height, int64_t num_samples, double radius, bool along_ray, bool ortho, bool mask, int64_t activation,
    std::optional<Tensor> grad_maps, bool need_coordinates) {
  const auto run = [&]<class T>(T) {
    Prepared<T> prepared({depth, rays, projection, jitter, num_samples, radius, along_ray, ortho, mask}, query.size(4),
                         maps, bias, activation);
    prepared.restrict(first_row, band, map_height);
    const Geometry<T>& g = prepared.job.geometry;
    prepared.job.query = prepared.rows(query), prepared.job.grad_out = prepared.rows(grad_out);
    check_weight(prepared, weight), check_weight(prepared, grad_score);
    Tensor grad_query =
        uninitialised<T>(maps, {g.batch, g.queries, g.height, g.width, prepared.job.heads, prepared.job.channels});
    Tensor grad_bias = zeros<T>(maps, {prepared.job.channels});
    const int64_t per_image = g.pixels() * g.points * g.slots * 2;
    Tensor grad_coordinate = torch::stable::new_empty(maps, {0}, scalar_type<T>());
    if (need_coordinates)
      grad_coordinate = uninitialised<T>(maps, {g.batch, g.queries, g.height, g.width, g.points, g.slots, 2});
    Targets<T> targets;
    targets.query = elements<T>(grad_query), targets.bias = elements<T>(grad_bias);
    if (grad_maps) {
      bool fits = grad_maps->dim() == 6 && grad_maps->scalar_type() == scalar_type<T>() && grad_maps->stride(5) == 1;
      for (int d = 0; fits && d < 6; ++d) fits = grad_maps->size(d) == maps.size(d);
      STD_TORCH_CHECK(fits, "epipolar: grad_maps must be like maps, channels next to each other");
      targets.maps = maps_of<T>(*grad_maps);
    }
    T* total = elements<T>(grad_coordinate);
    backward_from_scores(prepared, elements<T>(std::as_const(weight)), elements<T>(std::as_const(grad_score)), targets,
                         need_coordinates, [&](int64_t image, const T* by_block) {
                           parallel(g.pixels(), [&](int64_t begin, int64_t end) {
                             const int64_t row = g.points * g.slots * 2;
                             for (int64_t i = begin * row; i < end * row; ++i) {
                               T sum = 0;
                               for (int64_t b = 0; b < prepared.blocks(); ++b) sum += by_block[b * per_image + i];
                               total[image * per_image + i] = sum;
                             }
                           });
                         });
    return std::make_tuple(grad_query, grad_bias, grad_coordinate);
  };
  return query.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

std::tuple<Tensor, Tensor, Tensor> epipolar_coordinates_backward(Tensor grad_coordinate, Tensor depth, Tensor rays,
                                                                 Tensor projection, std::optional<Tensor> jitter,
                                                                 int64_t first_row, int64_t num_samples, double radius,
                                                                 bool along_ray, bool ortho, int64_t map_height,
                                                                 int64_t map_width) {
  const auto run = [&]<class T>(T) {
    Cameras<T> cameras(depth, rays, projection, jitter, num_samples, radius, along_ray, ortho, false);
    Geometry<T>& g = cameras.geometry;
    g.first_row = first_row, g.map_height = map_height, g.map_width = map_width;
    const int64_t per_image = g.pixels() * g.points * g.slots * 2;
    STD_TORCH_CHECK(grad_coordinate.numel() == g.images() * per_image && grad_coordinate.is_contiguous() &&
                        grad_coordinate.scalar_type() == scalar_type<T>(),
                    "epipolar: grad_coordinate must be contiguous [B, Q, H, W, P, N, 2]");
    Tensor grad_depth = zeros<T>(depth, {g.batch, g.queries, g.height, g.width});
    Tensor grad_rays = zeros<T>(depth, {g.batch, g.queries, 2, 3});
    Tensor grad_projection = zeros<T>(depth, {g.batch, g.queries, g.slots, 3, 4});
    for (int64_t image = 0; image < g.images(); ++image)
      chain_coordinates(g, tiling(g, 1), image, elements<T>(std::as_const(grad_coordinate)) + image * per_image, 1,
                        elements<T>(grad_depth), elements<T>(grad_rays), elements<T>(grad_projection));
    return std::make_tuple(grad_depth, grad_rays, grad_projection);
  };
  return depth.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

// The rows [begin, end) of every slot's map that strips of so many rows of each image read, [B, Q, strips, N, 2].
Tensor epipolar_reach(Tensor depth, Tensor rays, Tensor projection, std::optional<Tensor> jitter, int64_t num_samples,
                      double radius, bool along_ray, bool ortho, int64_t map_height, int64_t map_width, int64_t rows) {
  const auto run = [&]<class T>(T) {
    Cameras<T> cameras(depth, rays, projection, jitter, num_samples, radius, along_ray, ortho, false);
    Geometry<T>& g = cameras.geometry;
    STD_TORCH_CHECK(rows >= 1, "epipolar_reach: a strip has at least one row");
    g.map_height = map_height, g.map_width = map_width;
    const Tiling tiles = tiling(g, 1);
    const int64_t strips = (g.height + rows - 1) / rows, pairs = g.slots * 2;
    Buffer<int64_t> by_tile(g.images() * tiles.per_image() * pairs);
    parallel(g.images() * tiles.per_image(),
             [&](int64_t begin, int64_t end) { kernels().reach<T>()(g, tiles, begin, end, by_tile.data()); });
    Tensor out = torch::stable::new_empty(depth, {g.batch, g.queries, strips, g.slots, 2}, ScalarType::Long);
    int64_t* const all = elements<int64_t>(out);
    for (int64_t i = 0; i < out.numel(); i += 2) all[i] = map_height, all[i + 1] = 0;
    for (int64_t t = 0; t < g.images() * tiles.per_image(); ++t) {
      const int64_t first = t % tiles.per_image() / tiles.across * tiles.rows, last = first + tiles.rows - 1;
      for (int64_t s = first / rows; s <= std::min(last / rows, strips - 1); ++s) {
        int64_t* to = all + (t / tiles.per_image() * strips + s) * pairs;
        const int64_t* from = by_tile.data() + t * pairs;
        for (int64_t n = 0; n < pairs; n += 2)
          to[n] = std::min(to[n], from[n]), to[n + 1] = std::max(to[n + 1], from[n + 1]);
      }
    }
    return out;
  };
  return depth.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace cvc::epipolar

STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def(
      "epipolar_attention_into(Tensor query, Tensor maps, Tensor bias, Tensor depth, Tensor rays, Tensor projection, "
      "Tensor? jitter, int first_row, int[] band, int map_height, float scale, int num_samples, float radius, "
      "bool along_ray, bool ortho, bool mask, int activation, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "epipolar_scores(Tensor query, Tensor? grad_out, Tensor maps, Tensor bias, Tensor depth, Tensor rays, "
      "Tensor projection, Tensor? jitter, int first_row, int[] band, int map_height, int num_samples, float radius, "
      "bool along_ray, bool ortho, bool mask, int activation, Tensor(a!) score, Tensor(b!)? grad_weight) -> ()");
  m.def(
      "epipolar_context(Tensor weight, Tensor maps, Tensor bias, Tensor depth, Tensor rays, Tensor projection, "
      "Tensor? jitter, int first_row, int[] band, int map_height, int num_samples, float radius, bool along_ray, "
      "bool ortho, bool mask, int activation, Tensor(a!) out) -> ()");
  m.def(
      "epipolar_scores_backward(Tensor grad_out, Tensor query, Tensor weight, Tensor grad_score, Tensor maps, "
      "Tensor bias, Tensor depth, Tensor rays, Tensor projection, Tensor? jitter, int first_row, int[] band, "
      "int map_height, int num_samples, float radius, "
      "bool along_ray, bool ortho, bool mask, int activation, Tensor(a!)? grad_maps, bool need_coordinates) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "epipolar_coordinates_backward(Tensor grad_coordinate, Tensor depth, Tensor rays, Tensor projection, "
      "Tensor? jitter, int first_row, int num_samples, float radius, bool along_ray, bool ortho, int map_height, "
      "int map_width) -> (Tensor, Tensor, Tensor)");
  m.def(
      "epipolar_reach(Tensor depth, Tensor rays, Tensor projection, Tensor? jitter, int num_samples, float radius, "
      "bool along_ray, bool ortho, int map_height, int map_width, int rows) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("epipolar_attention_into", TORCH_BOX(&cvc::epipolar::epipolar_attention_into));
  m.impl("epipolar_scores", TORCH_BOX(&cvc::epipolar::epipolar_scores));
  m.impl("epipolar_context", TORCH_BOX(&cvc::epipolar::epipolar_context));
  m.impl("epipolar_scores_backward", TORCH_BOX(&cvc::epipolar::epipolar_scores_backward));
  m.impl("epipolar_coordinates_backward", TORCH_BOX(&cvc::epipolar::epipolar_coordinates_backward));
  m.impl("epipolar_reach", TORCH_BOX(&cvc::epipolar::epipolar_reach));
}
