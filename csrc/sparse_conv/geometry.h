// Which input voxel an output voxel sees through an offset of the kernel.
#pragma once

#include <vector>

#include "common/hd.h"
#include "voxels/keys.h"

namespace cvc::sparse_conv {

constexpr int64_t kMaxKernel = 256;

// One axis of a convolution; out = (in + padding - offset·dilation) / stride, transposed the other way round.
struct Axis {
  int64_t kernel, stride, dilation, padding;

  // The input coordinate under offset k of an output coordinate; −1 where there is none.
  CVC_HD int64_t source(int64_t out, int64_t k, bool transposed) const {
    int64_t in;
    if (transposed) {
      in = out + padding - k * dilation;
      if (in < 0 || in % stride != 0) return -1;
      in /= stride;
    } else {
      in = out * stride - padding + k * dilation;
    }
    return in < 0 || in >= int64_t{voxels::kMaxCoord} ? -1 : in;
  }

  // The output coordinate that sees an input coordinate through offset k; −1 where there is none.
  CVC_HD int64_t target(int64_t in, int64_t k, bool transposed) const { return source(in, k, !transposed); }
};

struct Geometry {
  Axis axis[3];
  bool transposed;

  CVC_HD int64_t offsets() const { return axis[0].kernel * axis[1].kernel * axis[2].kernel; }
};

inline Geometry geometry_of(const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& dilation, const std::vector<int64_t>& padding,
                            bool transposed) {
  Geometry g{};
  for (int i = 0; i < 3; ++i) g.axis[i] = {kernel[i], stride[i], dilation[i], padding[i]};
  g.transposed = transposed;
  return g;
}

CVC_HD inline uint64_t make_key(int64_t batch, int64_t x, int64_t y, int64_t z) {
  return static_cast<uint64_t>(((batch << 16 | x) << 16 | y) << 16 | z);
}

}  // namespace cvc::sparse_conv
