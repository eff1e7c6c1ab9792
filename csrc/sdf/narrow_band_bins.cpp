#include "sdf/narrow_band_bins.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#if defined(__unix__)
#include <unistd.h>
#endif

namespace cvc::narrow_band {

int64_t memory_bytes() {
#if defined(_SC_PHYS_PAGES)
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
#else
  return int64_t{1} << 40;
#endif
}

namespace {

// Numbers distinct cells in order of appearance and counts their spheres.
class CellTable {
 public:
  uint32_t count(int64_t key) {
    if (key == last_key_) return ++counts[last_], last_;
    size_t at = hash(key);
    while (slots_[at] != kFree && keys[slots_[at]] != key) at = (at + 1) & mask_;
    if (slots_[at] == kFree) {
      slots_[at] = static_cast<uint32_t>(keys.size());
      keys.push_back(key);
      counts.push_back(0);
      if (2 * keys.size() > slots_.size()) grow();
      last_ = static_cast<uint32_t>(keys.size() - 1);
    } else {
      last_ = slots_[at];
    }
    last_key_ = key;
    ++counts[last_];
    return last_;
  }

  std::vector<int64_t> keys;
  std::vector<uint32_t> counts;

 private:
  static constexpr uint32_t kFree = UINT32_MAX;
  size_t hash(int64_t key) const {
    return static_cast<size_t>(static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15u >> 20) & mask_;
  }
  void grow() {
    slots_.assign(2 * slots_.size(), kFree);
    mask_ = slots_.size() - 1;
    for (size_t i = 0; i < keys.size(); ++i) {
      size_t at = hash(keys[i]);
      while (slots_[at] != kFree) at = (at + 1) & mask_;
      slots_[at] = static_cast<uint32_t>(i);
    }
  }

  std::vector<uint32_t> slots_ = std::vector<uint32_t>(1 << 14, kFree);
  size_t mask_ = (1 << 14) - 1;
  int64_t last_key_ = -1;
  uint32_t last_ = 0;
};

// The sphere of a face, and its cell as numbered in its chunk.
struct Part {
  static constexpr uint32_t kNone = UINT32_MAX, kMany = UINT32_MAX - 1;  // cells of faces without one, with several
  uint32_t packed, cell;
};

// One of the spheres of a long triangle.
struct LongPart {
  uint32_t packed, cell, face;
};

// The spheres of a run of faces. Those of long triangles are apart: most meshes have few, and a face is not written
// down for every sphere.
struct Chunk {
  int64_t first_face;
  Buffer<Part> parts;           // by face
  std::vector<LongPart> longs;  // in order of their faces
  int64_t ones = 0;             // faces with one sphere
  CellTable cells;
  std::vector<uint32_t> next;  // of each of its cells: where its next sphere goes
  Status status = Status::ok;

  int64_t size() const { return ones + static_cast<int64_t>(longs.size()); }

  // Calls with (packed, face, cell) of every sphere, in order of the faces.
  template <class Visit>
  void each(const Visit& visit) const {
    auto next_long = longs.begin();
    for (int64_t i = 0; i < parts.size(); ++i) {
      const Part& part = parts[i];
      const uint32_t face = static_cast<uint32_t>(first_face + i);
      if (part.cell < Part::kMany) {
        visit(part.packed, face, part.cell);
      } else if (part.cell == Part::kMany) {
        for (; next_long != longs.end() && next_long->face == face; ++next_long)
          visit(next_long->packed, face, next_long->cell);
      }
    }
  }
};

struct Binning {
  Grid grid;
  double largest_radius;
  int64_t part_limit;  // parts per chunk, voxels of the band: more do not fit into this machine's memory
  double voxel_limit;

  // Does a long triangle alone have too many voxels? One within the grid has its area times half the band at least, on
  // one side or the other. Told before any of its parts are made.
  bool too_large(Point a, Point b, Point c) const {
    const Point low = {min(min(a.x, b.x), c.x), min(min(a.y, b.y), c.y), min(min(a.z, b.z), c.z)};
    const Point high = {max(max(a.x, b.x), c.x), max(max(a.y, b.y), c.y), max(max(a.z, b.z), c.z)};
    if (min(min(low.x, low.y), low.z) < 0 || high.x > grid.size[0] || high.y > grid.size[1] || high.z > grid.size[2])
      return false;
    const Point normal = cross(b - a, c - a);
    return 0.5 * std::sqrt(dot(normal, normal)) * 0.5 * min(grid.band, 0.5 * grid.size[0]) > voxel_limit;
  }

  // Adds the spheres of a face that is not known to be a good one.
  template <class Real, class Index>
  void add(Chunk& chunk, const Mesh<Real, Index>& mesh, int64_t face, int64_t batch) const {
    Point p[3];
    for (int corner = 0; corner < 3; ++corner) {
      const int64_t v = mesh.faces[3 * face + corner];
      if (v < 0 || v >= mesh.vertex_count) {
        chunk.status = Status::index_out_of_range;
        return;
      }
      const Real* q = mesh.vertices + 3 * v;
      p[corner] = {(q[0] - grid.low[0]) * grid.voxels, (q[1] - grid.low[1]) * grid.voxels,
                   (q[2] - grid.low[2]) * grid.voxels};
      if (!(std::abs(p[corner].x) + std::abs(p[corner].y) + std::abs(p[corner].z) <= 3.0 * kFarthest)) {
        const double farthest = max(max(std::abs(p[corner].x), std::abs(p[corner].y)), std::abs(p[corner].z));
        chunk.status = farthest < HUGE_VAL ? Status::too_far : Status::not_finite;
        return;
      }
    }
    add(chunk, static_cast<uint32_t>(face), batch, p[0], p[1], p[2]);
  }

  // Adds the spheres of triangle abc, in grid coordinates; in parts if it is long.
  void add(Chunk& chunk, uint32_t face, int64_t batch, Point a, Point b, Point c) const {
    const Bounded t = bounded(a, b, c);
    if (beyond(t, grid.band, grid.size)) return;
    if (static_cast<int64_t>(chunk.longs.size()) > part_limit) chunk.status = Status::too_large;
    if (chunk.status != Status::ok) return;
    if (t.radius > largest_radius) {
      if (too_large(a, b, c)) {
        chunk.status = Status::too_large;
        return;
      }
      const Point middle = 0.5 * (t.a + t.b);
      add(chunk, face, batch, t.a, middle, t.c);
      add(chunk, face, batch, middle, t.b, t.c);
      return;
    }
    const double cell[3] = {std::floor(t.centre.x / kBlock), std::floor(t.centre.y / kBlock),
                            std::floor(t.centre.z / kBlock)};
    const auto step = [](double x, double corner) {
      return static_cast<uint32_t>((x - kBlock * corner) / kCentreStep);
    };
    const uint32_t packed = min(step(t.centre.x, cell[0]), 255u) | min(step(t.centre.y, cell[1]), 255u) << 8 |
                            min(step(t.centre.z, cell[2]), 255u) << 16 |
                            static_cast<uint32_t>(std::ceil((t.radius + kCentreError) / kRadiusStep)) << 24;
    const int64_t key =
        cell_key(batch, static_cast<int64_t>(cell[0]), static_cast<int64_t>(cell[1]), static_cast<int64_t>(cell[2]));
    chunk.longs.push_back({packed, chunk.cells.count(key), face});
  }
};

}  // namespace

template <class Real, class Index>
Bins make_bins(const Mesh<Real, Index>& mesh, const int64_t* face_batch, const Grid& grid,
               SphereKernel<Real, Index> kernel, const Parallel& parallel) {
  Bins bins;
  // The shortest reach that leaves triangles two voxels of radius; a sphere centred outside the reach is at least
  // 8·reach + 1/2 from the block's voxel centres.
  bins.reach = static_cast<int32_t>(std::ceil((grid.band + 1.5) / kBlock));
  const double radius = min<double>(kLargestRadius, kBlock * bins.reach + 0.5 - grid.band);
  const int64_t chunk_count = max<int64_t>(1, min(2 * parallel.threads, mesh.face_count / 4096));
  const double bytes = static_cast<double>(memory_bytes());
  const Binning binning{grid, min(radius, 254.5 * kRadiusStep - kCentreError),
                        static_cast<int64_t>(bytes / 4 / (sizeof(LongPart) + 8) / static_cast<double>(chunk_count)),
                        bytes / kBytesPerVoxel};
  std::vector<Chunk> chunks(static_cast<size_t>(chunk_count));
  parallel.run(chunk_count, [&](int64_t k) {
    Chunk& chunk = chunks[k];
    const int64_t first = mesh.face_count * k / chunk_count, last = mesh.face_count * (k + 1) / chunk_count;
    chunk.first_face = first;
    chunk.parts = Buffer<Part>(last - first);
    FaceSpheres spheres;
    for (int64_t f = first; f < last; f += FaceSpheres::kFaces) {
      const int64_t count = min<int64_t>(last - f, FaceSpheres::kFaces);
      kernel({mesh, grid, binning.largest_radius, f, count, &spheres});
      for (int64_t i = 0; i < count; ++i) {
        const int64_t batch = face_batch ? face_batch[f + i] : 0;
        Part& part = chunk.parts[f + i - first];
        if (batch < 0 || batch >= kLargestBatch) {
          chunk.status = Status::bad_batch;
        } else if (spheres.kind[i] == FaceSpheres::kOne) {
          const int64_t key = cell_key(batch, spheres.cell[0][i], spheres.cell[1][i], spheres.cell[2][i]);
          part = {spheres.packed[i], chunk.cells.count(key)};
          ++chunk.ones;
        } else if (spheres.kind[i] == FaceSpheres::kUnusual) {
          part = {0, Part::kMany};
          binning.add(chunk, mesh, f + i, batch);
        } else {
          part = {0, Part::kNone};
        }
        if (chunk.status != Status::ok) return;
      }
    }
  });
  int64_t total = 0;
  for (const Chunk& chunk : chunks) {
    if (chunk.status != Status::ok) bins.status = chunk.status;
    total += chunk.size();
  }
  if (total >= int64_t{UINT32_MAX} - 16) bins.status = Status::too_large;
  if (bins.status != Status::ok) return bins;

  // Cells in order; within a cell first come the spheres of the first chunk, so the order is that of the faces.
  struct Source {
    int64_t key;
    uint32_t chunk, cell;
  };
  std::vector<Source> sources;
  for (uint32_t k = 0; k < chunks.size(); ++k)
    for (uint32_t c = 0; c < chunks[k].cells.keys.size(); ++c) sources.push_back({chunks[k].cells.keys[c], k, c});
  std::sort(sources.begin(), sources.end(),
            [](const Source& a, const Source& b) { return a.key != b.key ? a.key < b.key : a.chunk < b.chunk; });
  for (Chunk& chunk : chunks) chunk.next.resize(chunk.cells.keys.size());
  uint32_t at = 0;
  int64_t key = -1;
  for (const Source& s : sources) {
    if (s.key != key) {
      if (key < 0 || s.key >> kKeyBits != key >> kKeyBits) {
        const uint32_t first = static_cast<uint32_t>(bins.cell_z.size());
        bins.rows.push_back(
            {static_cast<int32_t>(s.key >> (3 * kKeyBits)), key_field(s.key, 2), key_field(s.key, 1), first, first});
      }
      key = s.key;
      bins.cell_z.push_back(key_field(key, 0));
      bins.begin.push_back(at);
      ++bins.rows.back().last;
    }
    chunks[s.chunk].next[s.cell] = at;
    at += chunks[s.chunk].cells.counts[s.cell];
  }
  bins.begin.push_back(at);

  bins.packed = Buffer<uint32_t>(total + 16);
  bins.face = Buffer<uint32_t>(total + 16);
  for (int64_t i = total; i < total + 16; ++i) bins.packed[i] = bins.face[i] = 0;
  parallel.run(chunk_count, [&](int64_t k) {
    Chunk& chunk = chunks[k];
    chunk.each([&](uint32_t packed, uint32_t face, uint32_t cell) {
      const uint32_t to = chunk.next[cell]++;
      bins.packed[to] = packed;
      bins.face[to] = face;
    });
  });
  return bins;
}

template Bins make_bins(const Mesh<float, int32_t>&, const int64_t*, const Grid&, SphereKernel<float, int32_t>,
                        const Parallel&);
template Bins make_bins(const Mesh<float, int64_t>&, const int64_t*, const Grid&, SphereKernel<float, int64_t>,
                        const Parallel&);
template Bins make_bins(const Mesh<double, int32_t>&, const int64_t*, const Grid&, SphereKernel<double, int32_t>,
                        const Parallel&);
template Bins make_bins(const Mesh<double, int64_t>&, const int64_t*, const Grid&, SphereKernel<double, int64_t>,
                        const Parallel&);

}  // namespace cvc::narrow_band
