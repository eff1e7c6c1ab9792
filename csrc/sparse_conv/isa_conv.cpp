// Convolution and weight gradient as register-blocked matrix products whose rows are gathered on the fly.
//
// A block of output rows is accumulated in cache. For each offset the rows that have a neighbour there are listed, and
// their products with the offset's weights are formed kRows rows by two vectors at a time, reading the input rows in
// place: no gathered copy of the features exists, and no two threads write the same row. Every sum has one fixed
// order: results do not depend on the number of threads.
#include <cstring>

#include "common/isa.h"
#include "common/simd.h"
#include "sparse_conv/job.h"

namespace cvc::sparse_conv {
namespace {

#if defined(CVC_SIMD_AVX512)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;  // with two vectors each: 12 of 16 registers accumulate
#endif

template <class T>
constexpr int kPanel = 2 * kWidth<T>;  // output channels of a tile

constexpr int64_t kBlockBytes = 128 << 10;  // of accumulators
constexpr int64_t kMaxBlockRows = 512, kMinBlockRows = 48;
constexpr int64_t kDepth = 256;  // pairs of a packed slice of the weight gradient

inline int64_t panels(int64_t channels, int64_t width) { return (channels + width - 1) / width; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// --- convolution -----------------------------------------------------------------------------------------------------

template <class T>
int64_t panels_of(const ConvJob& job) {
  return panels(job.out_channels, kPanel<T>);
}

// Depthwise convolution has nothing to block: one multiply-add per element.
bool is_depthwise(const ConvJob& job) { return job.in_channels == 1 && job.out_channels == 1 && job.groups > 1; }

template <class T>
int64_t packed_size_of(const ConvJob& job) {
  if (is_depthwise(job)) return job.offsets * job.groups;
  return job.offsets * job.groups * panels_of<T>(job) * job.in_channels * kPanel<T>;
}

// [offset][group][panel][input channel][channel of the panel], zeros beyond the last output channel.
template <class T>
void pack(const ConvJob& job, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(job.weight);
  const int64_t columns = is_depthwise(job) ? 1 : kPanel<T>, count = panels(job.out_channels, columns);
  T* to = static_cast<T*>(job.packed) + begin * job.groups * count * job.in_channels * columns;
  for (int64_t k = begin; k < end; ++k)
    for (int64_t g = 0; g < job.groups; ++g)
      for (int64_t p = 0; p < count; ++p)
        for (int64_t i = 0; i < job.in_channels; ++i)
          for (int64_t c = p * columns; c < (p + 1) * columns; ++c)
            *to++ = c < job.out_channels ? weight[((g * job.out_channels + c) * job.in_channels + i) * job.offsets + k]
                                         : T(0);
}

// out[r] += row[r] · panel for `rows` rows.
template <class T, int rows>
void tile(const T* const* row, T* const* out, const T* panel, int64_t depth) {
  using V = Vec<T>;
  constexpr int w = kWidth<T>;
  V sum[rows][2];  // from zero: short chains of roundings, one per offset
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = V{};
  for (int64_t i = 0; i < depth; ++i) {
    const V b0 = load<V>(panel + 2 * w * i), b1 = load<V>(panel + 2 * w * i + w);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const V a = row[r][i] - V{};
      sum[r][0] += a * b0;
      sum[r][1] += a * b1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    store(out[r], load<V>(out[r]) + sum[r][0]);
    store(out[r] + w, load<V>(out[r] + w) + sum[r][1]);
  }
}

template <class T, int rows>
void last_tile(int64_t count, const T* const* row, T* const* out, const T* panel, int64_t depth) {
  if constexpr (rows > 0) {
    if (count == rows) return tile<T, rows>(row, out, panel, depth);
    last_tile<T, rows - 1>(count, row, out, panel, depth);
  }
}

template <class T>
void add_depthwise(const T* in, const T* weight, T* out, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) out[c] += weight[c] * in[c];
}

template <class T>
void convolve_rows(const ConvJob& job, int64_t begin, int64_t end) {
  const bool depthwise = is_depthwise(job);
  const int64_t groups = depthwise ? 1 : job.groups;
  const int64_t in_channels = depthwise ? job.groups : job.in_channels;
  const int64_t out_channels = depthwise ? job.groups : job.out_channels;
  const int64_t count = panels(out_channels, kPanel<T>), padded = count * kPanel<T>, width = groups * padded;
  const int64_t in_stride = groups * in_channels, out_stride = groups * out_channels;
  const T* const feats = static_cast<const T*>(job.feats);
  const T* const packed = static_cast<const T*>(job.packed);
  T* const out = static_cast<T*>(job.out);

  int64_t block = kBlockBytes / static_cast<int64_t>(sizeof(T) * width);
  block = block > kMaxBlockRows ? kMaxBlockRows : block < kMinBlockRows ? kMinBlockRows : block;
  T* const sums = new T[block * width];
  T* const start = new T[width]();
  const T** const row = new const T*[block];
  T** const sum = new T*[block];
  if (job.bias)
    for (int64_t g = 0; g < groups; ++g)
      std::memcpy(start + g * padded, static_cast<const T*>(job.bias) + g * out_channels, out_channels * sizeof(T));

  for (int64_t first = begin; first < end; first += block) {
    const int64_t rows = smaller(block, end - first);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(sums + r * width, start, width * sizeof(T));
    for (int64_t k = 0; k < job.offsets; ++k) {
      int64_t pairs = 0;
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t from = job.map[(first + r) * job.offsets + k];
        row[pairs] = feats + from * in_stride;
        sum[pairs] = sums + r * width;
        pairs += from >= 0;
      }
      if (depthwise) {
        for (int64_t p = 0; p < pairs; ++p) add_depthwise(row[p], packed + k * in_channels, sum[p], in_channels);
        continue;
      }
      for (int64_t g = 0; g < groups; ++g) {
        const T* panel = packed + (k * groups + g) * count * in_channels * kPanel<T>;
        for (int64_t c = 0; c < count; ++c, panel += in_channels * kPanel<T>) {
          int64_t p = 0;
          for (; p + kRows <= pairs; p += kRows) tile<T, kRows>(row + p, sum + p, panel, in_channels);
          last_tile<T, kRows - 1>(pairs - p, row + p, sum + p, panel, in_channels);
          for (int64_t q = 0; q < pairs; ++q) sum[q] += kPanel<T>;
        }
        for (int64_t q = 0; q < pairs; ++q) row[q] += in_channels;
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t g = 0; g < groups; ++g)
        std::memcpy(out + (first + r) * out_stride + g * out_channels, sums + r * width + g * padded,
                    out_channels * sizeof(T));
  }
  delete[] sums;
  delete[] start;
  delete[] row;
  delete[] sum;
}

// --- weight gradient -------------------------------------------------------------------------------------------------

// Rows of a slice as [tile of `columns` channels][kDepth][column]. What the last tile has beyond the last channel is
// never written: it stays the zero that it was made.
template <class T, int columns>
void pack_slice(const T* const* row, int64_t pairs, int64_t channels, T* to) {
  int64_t first = 0;
  for (; first + columns <= channels; first += columns, to += kDepth * columns)
    for (int64_t p = 0; p < pairs; ++p) std::memcpy(to + p * columns, row[p] + first, columns * sizeof(T));
  const int64_t rest = channels - first;
  if (rest == 0) return;
  for (int64_t p = 0; p < pairs; ++p) {
    const T* const from = row[p] + first;
    int64_t c = 0;
    for (; c + 4 <= rest; c += 4) std::memcpy(to + p * columns + c, from + c, 4 * sizeof(T));
    for (; c < rest; ++c) to[p * columns + c] = from[c];
  }
}

// sums[r] += Σ_p a[p][r] · b[p].
template <class T>
void outer_tile(const T* a, const T* b, int64_t pairs, T* sums, int64_t stride) {
  using V = Vec<T>;
  constexpr int w = kWidth<T>;
  V sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = V{};
  for (int64_t p = 0; p < pairs; ++p, a += kRows, b += 2 * w) {
    const V b0 = load<V>(b), b1 = load<V>(b + w);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V x = a[r] - V{};
      sum[r][0] += x * b0;
      sum[r][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    T* const to = sums + r * stride;
    store(to, load<V>(to) + sum[r][0]);
    store(to + w, load<V>(to + w) + sum[r][1]);
  }
}

// `channels` input channels of one group from `first` on, offsets [k_begin, k_end). Blocks of rows are the outer loop:
// what an offset reads is still in cache for the next one.
template <class T>
void weight_task(const WeightJob& job, int64_t g, int64_t first, int64_t channels, int64_t k_begin, int64_t k_end) {
  const int64_t a_tiles = panels(channels, kRows), b_panels = panels(job.out_channels, kPanel<T>);
  const int64_t stride = b_panels * kPanel<T>, size = a_tiles * kRows * stride;
  const int64_t in_stride = job.groups * job.in_channels, out_stride = job.groups * job.out_channels;
  const T* const feats = static_cast<const T*>(job.feats) + g * job.in_channels + first;
  const T* const grad_out = static_cast<const T*>(job.grad_out) + g * job.out_channels;
  T* const sums = new T[(k_end - k_begin) * size]();
  T* const a = new T[a_tiles * kRows * kDepth]();
  T* const b = new T[stride * kDepth]();
  const T* in[kDepth];
  const T* grad[kDepth];
  for (int64_t o = 0; o < job.rows_out; o += kDepth) {
    const int64_t rows = smaller(kDepth, job.rows_out - o);
    for (int64_t k = k_begin; k < k_end; ++k) {
      int64_t pairs = 0;
      for (int64_t r = o; r < o + rows; ++r) {
        const int32_t from = job.map[r * job.offsets + k];
        in[pairs] = feats + from * in_stride;
        grad[pairs] = grad_out + r * out_stride;
        pairs += from >= 0;
      }
      pack_slice<T, kRows>(in, pairs, channels, a);
      pack_slice<T, kPanel<T>>(grad, pairs, job.out_channels, b);
      for (int64_t j = 0; j < b_panels; ++j)
        for (int64_t i = 0; i < a_tiles; ++i)
          outer_tile<T>(a + i * kRows * kDepth, b + j * kPanel<T> * kDepth, pairs,
                        sums + (k - k_begin) * size + i * kRows * stride + j * kPanel<T>, stride);
    }
  }
  T* out = static_cast<T*>(job.grad_weight);
  for (int64_t c = 0; c < job.out_channels; ++c) {
    T* const to = out + ((g * job.out_channels + c) * job.in_channels + first) * job.offsets;
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t k = k_begin; k < k_end; ++k) to[i * job.offsets + k] = sums[(k - k_begin) * size + i * stride + c];
  }
  delete[] sums;
  delete[] a;
  delete[] b;
}

template <class T>
void weight_gradient_tasks(const WeightJob& job, int64_t begin, int64_t end) {
  const int64_t channels = panels(panels(job.in_channels, kRows), job.channel_splits) * kRows;
  const int64_t splits = job.channel_splits * job.offset_splits;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % splits / job.channel_splits, first = task % job.channel_splits * channels;
    if (first < job.in_channels)
      weight_task<T>(job, task / splits, first, smaller(channels, job.in_channels - first),
                     part * job.offsets / job.offset_splits, (part + 1) * job.offsets / job.offset_splits);
  }
}

// --- entry points ----------------------------------------------------------------------------------------------------

int64_t packed_size(const ConvJob& job) {
  return job.is_double ? packed_size_of<double>(job) : packed_size_of<float>(job);
}
void pack_weight(const ConvJob& job, int64_t begin, int64_t end) {
  job.is_double ? pack<double>(job, begin, end) : pack<float>(job, begin, end);
}
void convolve(const ConvJob& job, int64_t begin, int64_t end) {
  job.is_double ? convolve_rows<double>(job, begin, end) : convolve_rows<float>(job, begin, end);
}
void weight_gradient(const WeightJob& job, int64_t begin, int64_t end) {
  job.is_double ? weight_gradient_tasks<double>(job, begin, end) : weight_gradient_tasks<float>(job, begin, end);
}

}  // namespace

Kernels CVC_ISA_NAME(conv_kernels)() { return {packed_size, pack_weight, convolve, weight_gradient}; }

}  // namespace cvc::sparse_conv
