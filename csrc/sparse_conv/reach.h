// The output voxels that a convolution reaches. Ascending input voxels are planes of lines: an output line is the union
// of the reach of a few input lines and is put together as bits; output planes are made front to back by separate
// tasks. Nothing is sorted but lists of planes and of lines.
#pragma once

#include <algorithm>
#include <bit>
#include <vector>

#include "sparse_conv/geometry.h"
#include "voxels/ascending.h"

namespace cvc::sparse_conv {

// Calls f(low, high) for ranges of output coordinates below `extent` that see an input coordinate.
template <class F>
void for_reach(const Axis& axis, bool transposed, int64_t extent, int64_t in, const F& f) {
  if (axis.dilation != 1) {
    for (int64_t k = 0; k < axis.kernel; ++k) {
      const int64_t out = axis.target(in, k, transposed);
      if (out >= 0 && out < extent) f(out, out);
    }
    return;
  }
  // Without gaps between the taps the offsets 0 to kernel − 1 reach one range.
  int64_t low, high;
  if (transposed) {
    low = in * axis.stride - axis.padding;
    high = low + axis.kernel - 1;
  } else {
    const int64_t last = in + axis.padding, first = last - (axis.kernel - 1);
    low = first <= 0 ? 0 : (first + axis.stride - 1) / axis.stride;
    high = last / axis.stride;
  }
  low = max<int64_t>(low, 0);
  high = min(high, extent - 1);
  if (low <= high) f(low, high);
}

// An output plane and one of the input planes [begin, end) that it sees.
struct Sight {
  uint64_t bx;  // batch and x of a key
  int64_t begin, end;
};

inline std::vector<Sight> sights(const voxels::Ascending& in, const Geometry& g, int64_t extent) {
  std::vector<Sight> found;
  for (int64_t i = 0, next; i < in.size; i = next) {
    const uint64_t bx = in.key(i) >> 32;
    next = in.find((bx + 1) << 32);
    for_reach(g.axis[0], g.transposed, extent, static_cast<int64_t>(bx & 0xFFFF), [&](int64_t low, int64_t high) {
      for (int64_t x = low; x <= high; ++x) found.push_back({(bx & ~uint64_t{0xFFFF}) | uint64_t(x), i, next});
    });
  }
  std::sort(found.begin(), found.end(), [](const Sight& a, const Sight& b) { return a.bx < b.bx; });
  return found;
}

// Makes one output plane at a time; its lines are marked as bits of z.
class Reach {
 public:
  Reach(const voxels::Ascending& in, const Geometry& g, const int64_t* extent)
      : in_(in), g_(g), extent_(extent), bits_(extent[2] / 64 + 1, 0) {}

  // Appends the (y, z) of the plane that sees the input planes [first, last), as y · 2¹⁶ + z, ascending.
  void plane(const Sight* first, const Sight* last, std::vector<uint32_t>& out) {
    lines_.clear();
    for (; first < last; ++first)
      for (int64_t i = first->begin, next; i < first->end; i = next) {
        const uint64_t line = in_.key(i) >> 16;
        for (next = i + 1; next < first->end && in_.key(next) >> 16 == line;) ++next;
        for_reach(g_.axis[1], g_.transposed, extent_[1], static_cast<int64_t>(line & 0xFFFF),
                  [&](int64_t low, int64_t high) {
                    for (int64_t y = low; y <= high; ++y) lines_.push_back({y, i, next});
                  });
      }
    std::sort(lines_.begin(), lines_.end(), [](const Line& a, const Line& b) { return a.y < b.y; });
    for (size_t k = 0; k < lines_.size();) {
      const int64_t y = lines_[k].y;
      low_ = extent_[2], high_ = -1;
      for (; k < lines_.size() && lines_[k].y == y; ++k)
        for (int64_t i = lines_[k].begin; i < lines_[k].end; ++i)
          for_reach(g_.axis[2], g_.transposed, extent_[2], static_cast<int64_t>(in_.key(i) & 0xFFFF),
                    [&](int64_t low, int64_t high) { mark(low, high); });
      for (int64_t w = low_ >> 6; w <= high_ >> 6 && high_ >= 0; ++w) {
        for (uint64_t word = bits_[w]; word; word &= word - 1)
          out.push_back(static_cast<uint32_t>(y << 16 | (64 * w + std::countr_zero(word))));
        bits_[w] = 0;
      }
    }
  }

 private:
  struct Line {
    int64_t y, begin, end;
  };

  void mark(int64_t low, int64_t high) {
    low_ = min(low_, low);
    high_ = max(high_, high);
    for (int64_t z = low; z <= high;) {
      const int64_t end = min(high, z | 63);
      bits_[z >> 6] |= ~uint64_t{0} >> (63 - (end - z)) << (z & 63);
      z = end + 1;
    }
  }

  const voxels::Ascending& in_;
  const Geometry& g_;
  const int64_t* const extent_;
  std::vector<uint64_t> bits_;
  std::vector<Line> lines_;
  int64_t low_ = 0, high_ = -1;
};

}  // namespace cvc::sparse_conv
