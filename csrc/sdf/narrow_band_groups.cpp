#include "sdf/narrow_band_groups.h"

#include <algorithm>
#include <atomic>

#include "common/hd.h"

namespace cvc::narrow_band {
namespace {

// Spheres in a sphere's own cell, on average, from where groups pay.
constexpr double kManySpheres = 256;

double company(const Bins& bins) {
  double square = 0;
  for (size_t c = 0; c + 1 < bins.begin.size(); ++c) {
    const double n = bins.begin[c + 1] - bins.begin[c];
    square += n * n;
  }
  return bins.begin.back() > 0 ? square / bins.begin.back() : 0;
}

// Sorts spheres by the half voxel that their centre is in, along a Morton curve; those of one by their faces.
class MortonSort {
 public:
  MortonSort() {
    for (uint32_t i = 0; i < 16; ++i) spread_[i] = (i & 1) | (i & 2) << 2 | (i & 4) << 4 | (i & 8) << 6;
  }
  void operator()(uint32_t* packed, uint32_t* face, uint32_t n) {
    if (n <= kGroup) return;
    std::fill(next_.begin(), next_.end(), 0);
    if (from_.size() < n) from_.resize(n);
    for (uint32_t i = 0; i < n; ++i) {
      from_[i] = {packed[i], face[i]};
      ++next_[key(packed[i])];
    }
    uint32_t at = 0;
    for (uint32_t& k : next_) {
      const uint32_t count = k;
      k = at;
      at += count;
    }
    for (uint32_t i = 0; i < n; ++i) {
      const uint32_t to = next_[key(from_[i].packed)]++;
      packed[to] = from_[i].packed;
      face[to] = from_[i].face;
    }
  }

 private:
  struct Sphere {
    uint32_t packed, face;
  };
  uint32_t key(uint32_t packed) const {
    return spread_[packed >> 4 & 15] << 2 | spread_[packed >> 12 & 15] << 1 | spread_[packed >> 20 & 15];
  }
  uint32_t spread_[16];
  std::vector<uint32_t> next_ = std::vector<uint32_t>(16 * 16 * 16);
  std::vector<Sphere> from_;
};

}  // namespace

template <class Real, class Index>
Groups make_groups(const Mesh<Real, Index>& mesh, const Grid& grid, Bins& bins, GroupKernel<Real, Index> kernel,
                   const Parallel& parallel) {
  Groups groups;
  if (company(bins) < kManySpheres) return groups;
  release_kept_pages();  // of the binning: room for groups, which would be kept on top of it
  const size_t cells = bins.cell_z.size();
  groups.begin.resize(cells);
  uint32_t total = 0;
  for (size_t c = 0; c < cells; ++c) {
    groups.begin[c] = total;
    total += (bins.begin[c + 1] - bins.begin[c] + kGroup - 1) / kGroup;
  }
  const int64_t stride = int64_t{total} + 16;
  groups.numbers = Buffer<float>(kGroupFields * stride);
  for (int f = 0; f < kGroupFields; ++f) {
    groups.boxes.field[f] = groups.numbers.data() + f * stride;
    std::fill_n(groups.boxes.field[f] + total, 16, 0.0f);
  }
  groups.vertices = Buffer<uint32_t>(int64_t{SharedVertices::kMost} * total);  // most of it is never touched
  groups.vertices_begin.resize(cells);
  std::atomic<int64_t> vertices{0};
  const int64_t rows = static_cast<int64_t>(bins.rows.size()), tasks = min(rows, 16 * parallel.threads);
  parallel.run(tasks, [&](int64_t task) {
    MortonSort sort;
    std::vector<uint32_t> shared;
    for (int64_t r = rows * task / tasks; r < rows * (task + 1) / tasks; ++r) {
      const CellRow& row = bins.rows[r];
      for (uint32_t c = row.first; c < row.last; ++c) {
        const uint32_t begin = bins.begin[c], end = bins.begin[c + 1];
        sort(bins.packed.data() + begin, bins.face.data() + begin, end - begin);
        shared.resize(std::max<size_t>(shared.size(), SharedVertices::kMost * ((end - begin + kGroup - 1) / kGroup)));
        const uint32_t count =
            kernel({mesh,
                    grid,
                    {bins.packed.data(), bins.face.data()},
                    bins.packed.data(),
                    {double(kBlock) * row.x, double(kBlock) * row.y, double(kBlock) * bins.cell_z[c]},
                    begin,
                    end,
                    groups.begin[c],
                    groups.boxes,
                    shared.data()});
        const int64_t to = vertices.fetch_add(count);
        std::copy_n(shared.data(), count, groups.vertices.data() + to);
        groups.vertices_begin[c] = to;
      }
    }
  });
  return groups;
}

#define INSTANTIATE(Real, Index) \
  template Groups make_groups(const Mesh<Real, Index>&, const Grid&, Bins&, GroupKernel<Real, Index>, const Parallel&);
INSTANTIATE(float, int32_t)
INSTANTIATE(float, int64_t)
INSTANTIATE(double, int32_t)
INSTANTIATE(double, int64_t)
#undef INSTANTIATE

}  // namespace cvc::narrow_band
