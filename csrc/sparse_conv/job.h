// One sparse convolution on the CPU, as the kernels of isa_conv.cpp see it.
#pragma once

#include <cstdint>

namespace cvc::sparse_conv {

// out[o] = bias + Σ_k weight[k] · feats[map[o, k]], absent neighbours (−1) skipped.
struct ConvJob {
  const void* feats;   // [rows_in, groups * in_channels]
  const void* weight;  // [groups * out_channels, in_channels, offsets]
  const void* bias;    // [groups * out_channels] or null
  const int32_t* map;  // [rows_out, offsets]
  void* out;           // [rows_out, groups * out_channels]
  void* packed;        // packed_size() elements, filled by pack_weight
  int64_t offsets, groups;
  int64_t in_channels, out_channels;  // of one group
  bool is_double;
};

// grad_weight[k] = Σ_o grad_out[o] ⊗ feats[map[o, k]].
struct WeightJob {
  const void* feats;     // [rows_in, groups * in_channels]
  const void* grad_out;  // [rows_out, groups * out_channels]
  const int32_t* map;    // [rows_out, offsets]
  void* grad_weight;     // [groups * out_channels, in_channels, offsets]
  int64_t rows_out, offsets, groups;
  int64_t in_channels, out_channels;      // of one group
  int64_t channel_splits, offset_splits;  // tasks that share the input channels of a group, and the offsets
  bool is_double;
};

struct Kernels {
  // Elements of ConvJob::packed.
  int64_t (*packed_size)(const ConvJob& job);
  // Packs the weights of the offsets [begin, end).
  void (*pack_weight)(const ConvJob& job, int64_t begin, int64_t end);
  // Output rows [begin, end).
  void (*convolve)(const ConvJob& job, int64_t begin, int64_t end);
  // Tasks [begin, end) of groups * channel_splits * offset_splits.
  void (*weight_gradient)(const WeightJob& job, int64_t begin, int64_t end);
};

Kernels conv_kernels_baseline();
Kernels conv_kernels_avx2();
Kernels conv_kernels_avx512();

}  // namespace cvc::sparse_conv
