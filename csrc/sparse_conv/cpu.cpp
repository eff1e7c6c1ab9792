// Sparse convolution and pooling on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/buffer.h"
#include "common/isa.h"
#include "sparse_conv/job.h"

namespace cvc::sparse_conv {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowsPerTask = 1024;

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// --- convolution -----------------------------------------------------------------------------------------------------

Kernels kernels() { return CVC_ISA_PICK(conv_kernels)(); }

Tensor sparse_conv3d(Tensor feats, Tensor weight, std::optional<Tensor> bias, Tensor map, int64_t groups) {
  const int64_t out_channels = weight.size(0);
  Tensor out = torch::stable::new_empty(feats, {map.size(0), out_channels}, feats.scalar_type());
  if (out.numel() == 0) return out;
  ConvJob job{feats.const_data_ptr(),
              weight.const_data_ptr(),
              bias ? bias->const_data_ptr() : nullptr,
              static_cast<const int32_t*>(map.const_data_ptr()),
              out.mutable_data_ptr(),
              nullptr,
              map.size(1),
              groups,
              weight.size(1),
              out_channels / groups,
              is_double(feats)};
  const Kernels run = kernels();
  const size_t bytes = static_cast<size_t>(run.packed_size(job)) * (job.is_double ? sizeof(double) : sizeof(float));
  const Buffer<char> packed(static_cast<int64_t>(bytes));
  job.packed = packed.data();
  torch::stable::parallel_for(0, job.offsets, 1, [&](int64_t b, int64_t e) { run.pack_weight(job, b, e); });
  torch::stable::parallel_for(0, map.size(0), kRowsPerTask, [&](int64_t b, int64_t e) { run.convolve(job, b, e); });
  return out;
}

Tensor sparse_conv3d_weight_grad(Tensor feats, Tensor grad_out, Tensor map, int64_t groups) {
  const int64_t in_channels = feats.size(1) / groups, out_channels = grad_out.size(1);
  Tensor grad = torch::stable::new_empty(feats, {out_channels, in_channels, map.size(1)}, feats.scalar_type());
  if (grad.numel() == 0) return grad;
  // Any split gives the same sums. Of channels first: a task packs the gradients of all rows for its offsets.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t channel_splits = std::clamp<int64_t>(threads, 1, std::max<int64_t>(in_channels / 12, 1));
  const int64_t offset_splits = std::clamp<int64_t>(threads / channel_splits, 1, std::max<int64_t>(map.size(1), 1));
  const WeightJob job{feats.const_data_ptr(),
                      grad_out.const_data_ptr(),
                      static_cast<const int32_t*>(map.const_data_ptr()),
                      grad.mutable_data_ptr(),
                      map.size(0),
                      map.size(1),
                      groups,
                      in_channels,
                      out_channels / groups,
                      channel_splits,
                      offset_splits,
                      is_double(feats)};
  const Kernels run = kernels();
  torch::stable::parallel_for(0, job.groups * channel_splits * offset_splits, 1,
                              [&](int64_t b, int64_t e) { run.weight_gradient(job, b, e); });
  return grad;
}

// --- pooling ---------------------------------------------------------------------------------------------------------

// out[o] = Σ_k feats[map[o, k]].
template <class T>
void sum_rows(const T* feats, const int32_t* map, int64_t offsets, int64_t channels, int64_t begin, int64_t end,
              T* out) {
  for (int64_t o = begin; o < end; ++o) {
    T* const sum = out + o * channels;
    std::fill(sum, sum + channels, T(0));
    for (int64_t k = 0; k < offsets; ++k) {
      const int32_t i = map[o * offsets + k];
      if (i < 0) continue;
      for (int64_t c = 0; c < channels; ++c) sum[c] += feats[i * channels + c];
    }
  }
}

// Calls f with pointers of the features' type, in parallel over the output rows.
template <class F>
void for_rows(const Tensor& like, int64_t rows, F f) {
  torch::stable::parallel_for(0, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    if (is_double(like)) {
      f(double{}, begin, end);
    } else {
      f(float{}, begin, end);
    }
  });
}
template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

Tensor sparse_sum_pool3d(Tensor feats, Tensor map) {
  const int64_t rows = map.size(0), offsets = map.size(1), channels = feats.size(1);
  Tensor sum = torch::stable::new_empty(feats, {rows, channels}, feats.scalar_type());
  for_rows(feats, rows, [&](auto real, int64_t begin, int64_t end) {
    using T = decltype(real);
    sum_rows(in<T>(feats), in<int32_t>(map), offsets, channels, begin, end, out<T>(sum));
  });
  return sum;
}

// The first of the largest values and its offset; NaN is larger than everything. A row without neighbours gives 0, −1.
template <class T>
void max_rows(const T* feats, const int32_t* map, int64_t offsets, int64_t channels, int64_t begin, int64_t end, T* out,
              int32_t* offset) {
  for (int64_t o = begin; o < end; ++o) {
    T* const best = out + o * channels;
    int32_t* const which = offset + o * channels;
    std::fill(best, best + channels, T(0));
    std::fill(which, which + channels, -1);
    for (int64_t k = 0; k < offsets; ++k) {
      const int32_t i = map[o * offsets + k];
      if (i < 0) continue;
      for (int64_t c = 0; c < channels; ++c) {
        const T value = feats[i * channels + c];
        const bool better = which[c] < 0 || value > best[c] || (value != value && best[c] == best[c]);
        best[c] = better ? value : best[c];
        which[c] = better ? static_cast<int32_t>(k) : which[c];
      }
    }
  }
}

std::tuple<Tensor, Tensor> sparse_max_pool3d(Tensor feats, Tensor map) {
  const int64_t rows = map.size(0), offsets = map.size(1), channels = feats.size(1);
  Tensor best = torch::stable::new_empty(feats, {rows, channels}, feats.scalar_type());
  Tensor offset = torch::stable::new_empty(feats, {rows, channels}, ScalarType::Int);
  for_rows(feats, rows, [&](auto real, int64_t begin, int64_t end) {
    using T = decltype(real);
    max_rows(in<T>(feats), in<int32_t>(map), offsets, channels, begin, end, out<T>(best), out<int32_t>(offset));
  });
  return {best, offset};
}

// Every input row collects from the outputs that chose it: inverse[i, k] is the one that saw it under offset k.
template <class T>
void max_grad_rows(const T* grad_out, const int32_t* offset, const int32_t* inverse, int64_t offsets, int64_t channels,
                   int64_t begin, int64_t end, T* grad) {
  for (int64_t i = begin; i < end; ++i) {
    T* const sum = grad + i * channels;
    std::fill(sum, sum + channels, T(0));
    for (int64_t k = 0; k < offsets; ++k) {
      const int64_t o = inverse[i * offsets + k];
      if (o < 0) continue;
      for (int64_t c = 0; c < channels; ++c)
        sum[c] += offset[o * channels + c] == k ? grad_out[o * channels + c] : T(0);
    }
  }
}

Tensor sparse_max_pool3d_grad(Tensor grad_out, Tensor offset, Tensor inverse) {
  const int64_t rows = inverse.size(0), offsets = inverse.size(1), channels = grad_out.size(1);
  Tensor grad = torch::stable::new_empty(grad_out, {rows, channels}, grad_out.scalar_type());
  for_rows(grad_out, rows, [&](auto real, int64_t begin, int64_t end) {
    using T = decltype(real);
    max_grad_rows(in<T>(grad_out), in<int32_t>(offset), in<int32_t>(inverse), offsets, channels, begin, end,
                  out<T>(grad));
  });
  return grad;
}

}  // namespace
}  // namespace cvc::sparse_conv

// All tensors are contiguous, maps int32 with entries in [-1, rows of feats): Python sees to it.
STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def("sparse_conv3d(Tensor feats, Tensor weight, Tensor? bias, Tensor map, int groups) -> Tensor");
  m.def("sparse_conv3d_weight_grad(Tensor feats, Tensor grad_out, Tensor map, int groups) -> Tensor");
  m.def("sparse_sum_pool3d(Tensor feats, Tensor map) -> Tensor");
  m.def("sparse_max_pool3d(Tensor feats, Tensor map) -> (Tensor, Tensor)");
  m.def("sparse_max_pool3d_grad(Tensor grad_out, Tensor offset, Tensor inverse) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("sparse_conv3d", TORCH_BOX(&cvc::sparse_conv::sparse_conv3d));
  m.impl("sparse_conv3d_weight_grad", TORCH_BOX(&cvc::sparse_conv::sparse_conv3d_weight_grad));
  m.impl("sparse_sum_pool3d", TORCH_BOX(&cvc::sparse_conv::sparse_sum_pool3d));
  m.impl("sparse_max_pool3d", TORCH_BOX(&cvc::sparse_conv::sparse_max_pool3d));
  m.impl("sparse_max_pool3d_grad", TORCH_BOX(&cvc::sparse_conv::sparse_max_pool3d_grad));
}
