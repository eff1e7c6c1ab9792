#include <tuple>

#include "epipolar/attention_job.h"

namespace cvc::epipolar {
namespace {

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
std::tuple<Tensor, Tensor> forward(const Tensor& query, Prepared<T> prepared) {
  const Attention<T>& job = prepared.job;
  const Geometry<T>& g = job.geometry;
  Tensor out = uninitialised<T>(query, {g.batch, g.queries, g.height, g.width, job.heads, job.channels});
  Tensor lse = torch::stable::new_empty(query, {g.batch, g.queries, g.height, g.width, job.heads}, scalar_type<T>());
  prepared.forward(elements<T>(out), elements<T>(lse));
  return {out, lse};
}

// From the products <query, h> and <grad_out, h> to the attention and the gradient of <query, h>, in place.
template <class T>
void softmax_backward(const Attention<T>& job, const T* lse, const T* grad_lse, T* score, T* grad_weight) {
  const int64_t points = job.geometry.points;
  parallel(job.geometry.images() * job.geometry.pixels(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * job.heads; row < end * job.heads; ++row) {
      T *s = score + row * points, *g = grad_weight + row * points;
      if (lse[row] == -std::numeric_limits<T>::infinity()) {
        std::fill(s, s + points, T(0)), std::fill(g, g + points, T(0));
        continue;
      }
      T mean = grad_lse ? -grad_lse[row] : T(0);
      for (int64_t k = 0; k < points; ++k) s[k] = std::exp(job.scale * s[k] - lse[row]), mean += s[k] * g[k];
      for (int64_t k = 0; k < points; ++k) g[k] = job.scale * s[k] * (g[k] - mean);
    }
  });
}

template <class T>
Tensor wanted(const Tensor& like, bool is_wanted, torch::headeronly::IntHeaderOnlyArrayRef size) {
  return is_wanted ? zeros<T>(like, size) : torch::stable::new_empty(like, {0}, scalar_type<T>());
}

template <class T>
Six backward(const Tensor& query, Prepared<T> prepared, const Tensor& grad_out,
             const std::optional<Tensor>& grad_lse_in, const Tensor& lse_in, bool need_query, bool need_maps,
             bool need_bias, bool need_depth, bool need_cameras) {
  Attention<T>& job = prepared.job;
  const Geometry<T>& g = job.geometry;
  job.grad_out = prepared.rows(grad_out);
  const Tensor lse = torch::stable::contiguous(lse_in);
  std::optional<Tensor> grad_lse;
  if (grad_lse_in) grad_lse = torch::stable::contiguous(*grad_lse_in);
  Buffer<T> score(g.images() * prepared.weights()), grad_weight(g.images() * prepared.weights());
  fill_zero(score.data(), score.size()), fill_zero(grad_weight.data(), grad_weight.size());
  prepared.dots(score.data(), grad_weight.data());
  softmax_backward(job, elements<T>(lse), grad_lse ? elements<T>(*grad_lse) : nullptr, score.data(),
                   grad_weight.data());

  const bool coordinates = need_depth || need_cameras;
  Tensor grad_query = torch::stable::new_empty(query, {0}, scalar_type<T>());
  if (need_query)
    grad_query = uninitialised<T>(query, {g.batch, g.queries, g.height, g.width, job.heads, job.channels});
  Tensor grad_maps =
      wanted<T>(query, need_maps, {g.batch, g.queries, g.slots, g.map_height, g.map_width, job.channels});
  Tensor grad_bias = wanted<T>(query, need_bias, {job.channels});
  Tensor grad_depth = wanted<T>(query, coordinates, {g.batch, g.queries, g.height, g.width});
  Tensor grad_rays = wanted<T>(query, coordinates, {g.batch, g.queries, 2, 3});
  Tensor grad_projection = wanted<T>(query, coordinates, {g.batch, g.queries, g.slots, 3, 4});
  Targets<T> targets;
  if (need_query) targets.query = elements<T>(grad_query);
  if (need_maps) targets.maps = maps_of<T>(grad_maps);
  if (need_bias) targets.bias = elements<T>(grad_bias);
  backward_from_scores(
      prepared, score.data(), grad_weight.data(), targets, coordinates, [&](int64_t image, const T* grad_coordinate) {
        chain_coordinates(g, job.tiling, image, grad_coordinate, prepared.blocks(), elements<T>(grad_depth),
                          elements<T>(grad_rays), elements<T>(grad_projection));
      });
  const Tensor none = torch::stable::new_empty(query, {0}, scalar_type<T>());
  return {grad_query,
          grad_maps,
          grad_bias,
          need_depth ? grad_depth : none,
          need_cameras ? grad_rays : none,
          need_cameras ? grad_projection : none};
}

template <class T>
Prepared<T> prepare(const Tensor& query, const Tensor& maps, const Tensor& bias, const Tensor& depth,
                    const Tensor& rays, const Tensor& projection, const std::optional<Tensor>& jitter, double scale,
                    int64_t num_samples, double radius, bool along_ray, bool ortho, bool mask, int64_t activation) {
  STD_TORCH_CHECK(query.dim() == 6, "epipolar_attention: query must have 6 dimensions");
  Prepared<T> prepared({depth, rays, projection, jitter, num_samples, radius, along_ray, ortho, mask}, query.size(4),
                       maps, bias, activation);
  prepared.job.scale = static_cast<T>(scale);
  prepared.job.query = prepared.rows(query);
  return prepared;
}

std::tuple<Tensor, Tensor> epipolar_attention(Tensor query, Tensor maps, Tensor bias, Tensor depth, Tensor rays,
                                              Tensor projection, std::optional<Tensor> jitter, double scale,
                                              int64_t num_samples, double radius, bool along_ray, bool ortho, bool mask,
                                              int64_t activation) {
  const auto run = [&]<class T>(T) {
    return forward<T>(query, prepare<T>(query, maps, bias, depth, rays, projection, jitter, scale, num_samples, radius,
                                        along_ray, ortho, mask, activation));
  };
  return query.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

Six epipolar_attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor, Tensor lse, Tensor query,
                                Tensor maps, Tensor bias, Tensor depth, Tensor rays, Tensor projection,
                                std::optional<Tensor> jitter, double scale, int64_t num_samples, double radius,
                                bool along_ray, bool ortho, bool mask, int64_t activation, bool need_query,
                                bool need_maps, bool need_bias, bool need_depth, bool need_cameras) {
  const auto run = [&]<class T>(T) {
    return backward<T>(query,
                       prepare<T>(query, maps, bias, depth, rays, projection, jitter, scale, num_samples, radius,
                                  along_ray, ortho, mask, activation),
                       grad_out, grad_lse, lse, need_query, need_maps, need_bias, need_depth, need_cameras);
  };
  return query.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace cvc::epipolar

// The schemas of the family's kernels. Python has checked shapes, dtypes and names; strides may be any.
STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def(
      "epipolar_attention(Tensor query, Tensor maps, Tensor bias, Tensor depth, Tensor rays, Tensor projection, "
      "Tensor? jitter, float scale, int num_samples, float radius, bool along_ray, bool ortho, bool mask, "
      "int activation) -> (Tensor, Tensor)");
  m.def(
      "epipolar_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor query, "
      "Tensor maps, Tensor bias, Tensor depth, Tensor rays, Tensor projection, Tensor? jitter, float scale, "
      "int num_samples, float radius, bool along_ray, bool ortho, bool mask, int activation, bool need_query, "
      "bool need_maps, bool need_bias, bool need_depth, bool need_cameras) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("epipolar_attention", TORCH_BOX(&cvc::epipolar::epipolar_attention));
  m.impl("epipolar_attention_backward", TORCH_BOX(&cvc::epipolar::epipolar_attention_backward));
}
