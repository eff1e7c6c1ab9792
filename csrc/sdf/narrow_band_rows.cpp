#include "sdf/narrow_band_rows.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "common/hd.h"
#include "sdf/narrow_band_groups.h"

namespace cvc::narrow_band {
namespace {

inline const auto& pick(const Kernels& k, float, int32_t) { return k.float_int32; }
inline const auto& pick(const Kernels& k, float, int64_t) { return k.float_int64; }
inline const auto& pick(const Kernels& k, double, int32_t) { return k.double_int32; }
inline const auto& pick(const Kernels& k, double, int64_t) { return k.double_int64; }

template <class Real>
struct Block {
  const Real* distance;
  const uint32_t* face;
  int32_t z;  // in blocks
  uint8_t mask[kBlockRows];
};

// Blocks that share batch, x and y: the unit of work.
template <class Real>
struct BlockRow {
  int32_t batch, x, y;
  std::vector<Block<Real>> blocks;  // those that hold voxels, ascending
  int64_t start[kBlockRows];        // voxels of each (x, y) line; then where the line goes in the output
};

// Rows that cells within `reach` can touch, in order.
template <class Real>
std::vector<BlockRow<Real>> rows_in_reach(const Bins& bins, const Grid& grid) {
  const int32_t across = (grid.size[0] + kBlock - 1) / kBlock, down = (grid.size[1] + kBlock - 1) / kBlock;
  std::vector<BlockRow<Real>> rows;
  std::vector<int32_t> step(down + 1);
  const auto& cells = bins.rows;
  for (size_t batch_begin = 0; batch_begin < cells.size();) {
    const int32_t batch = cells[batch_begin].batch;
    size_t batch_end = batch_begin;
    while (batch_end < cells.size() && cells[batch_end].batch == batch) ++batch_end;
    size_t first = batch_begin;
    for (int32_t x = max(0, cells[batch_begin].x - bins.reach); x < across; ++x) {
      while (first < batch_end && cells[first].x < x - bins.reach) ++first;
      if (first == batch_end) break;
      if (cells[first].x > x + bins.reach) continue;
      std::fill(step.begin(), step.end(), 0);
      for (size_t r = first; r < batch_end && cells[r].x <= x + bins.reach; ++r) {
        const int32_t low = max(0, cells[r].y - bins.reach), high = min(down, cells[r].y + bins.reach + 1);
        if (low < high) ++step[low], --step[high];
      }
      for (int32_t y = 0, depth = 0; y < down; ++y) {
        depth += step[y];
        if (depth > 0) rows.push_back({batch, x, y, {}, {}});
      }
    }
    batch_begin = batch_end;
  }
  return rows;
}

// Results of one worker: bump allocation in large chunks.
template <class T>
class Arena {
 public:
  T* copy(const T* from, int64_t n) {
    if (chunks_.empty() || used_ + n > chunks_.back().size()) {
      chunks_.emplace_back(static_cast<int64_t>(kHugePage / sizeof(T)));
      used_ = 0;
    }
    T* to = chunks_.back().data() + used_;
    std::memcpy(to, from, sizeof(T) * static_cast<size_t>(n));
    used_ += n;
    return to;
  }

 private:
  std::vector<Buffer<T>> chunks_;
  int64_t used_ = 0;
};

template <class Real, class Index>
class Worker {
 public:
  Worker(const Mesh<Real, Index>& mesh, const Bins& bins, const Groups& groups, const Grid& grid,
         const KernelsFor<Real, Index>& kernels)
      : bins_(bins), groups_(groups), grid_(grid), kernels_(kernels) {
    job_.mesh = mesh;
    job_.grid = grid;
    job_.spheres = {bins.packed.data(), bins.face.data()};
    job_.groups = groups.boxes;
    job_.scratch = &scratch_;
    job_.out = &voxels_;
  }

  // Returns the number of voxels.
  int64_t run(BlockRow<Real>& row) {
    find_sources(row);
    const int32_t deep = (grid_.size[2] + kBlock - 1) / kBlock;
    step_.assign(deep + 1, 0);
    for (const Source& s : sources_)
      for (uint32_t c = s.next; c < s.last; ++c) {
        const int32_t low = max(0, bins_.cell_z[c] - bins_.reach), high = min(deep, bins_.cell_z[c] + bins_.reach + 1);
        if (low < high) ++step_[low], --step_[high];
      }
    for (int line = 0; line < kBlockRows; ++line) row.start[line] = 0;
    for (int32_t z = 0, depth = 0; z < deep; ++z) {
      depth += step_[z];
      if (depth > 0) run_block(row, z);
    }
    int64_t voxels = 0;
    for (const Block<Real>& block : row.blocks)
      for (const uint8_t line : block.mask) voxels += __builtin_popcount(line);
    return voxels;
  }

 private:
  struct Source {
    uint32_t next, last;
    float x, y;  // corner relative to the centre of the row's blocks
  };

  // The rows of cells around a row of blocks.
  void find_sources(const BlockRow<Real>& row) {
    sources_.clear();
    const auto before = [](const CellRow& a, const CellRow& b) {
      return a.batch != b.batch ? a.batch < b.batch : a.x != b.x ? a.x < b.x : a.y < b.y;
    };
    auto at = bins_.rows.begin();
    for (int32_t x = row.x - bins_.reach; x <= row.x + bins_.reach; ++x) {
      at = std::lower_bound(at, bins_.rows.end(), CellRow{row.batch, x, row.y - bins_.reach, 0, 0}, before);
      for (; at != bins_.rows.end() && at->batch == row.batch && at->x == x && at->y <= row.y + bins_.reach; ++at)
        sources_.push_back({at->first, at->last, static_cast<float>(kBlock * (at->x - row.x) - kBlock / 2),
                            static_cast<float>(kBlock * (at->y - row.y) - kBlock / 2)});
    }
  }

  void run_block(BlockRow<Real>& row, int32_t z) {
    runs_.clear();
    int64_t spheres = 0, groups = 0;
    for (Source& s : sources_) {
      while (s.next < s.last && bins_.cell_z[s.next] < z - bins_.reach) ++s.next;
      for (uint32_t c = s.next; c < s.last && bins_.cell_z[c] <= z + bins_.reach; ++c) {
        runs_.push_back({bins_.begin[c],
                         bins_.begin[c + 1],
                         groups_.any() ? groups_.begin[c] : 0,
                         {s.x, s.y, static_cast<float>(kBlock * (bins_.cell_z[c] - z) - kBlock / 2)},
                         groups_.any() ? groups_.vertices.data() + groups_.vertices_begin[c] : nullptr});
        spheres += bins_.begin[c + 1] - bins_.begin[c];
        groups += (bins_.begin[c + 1] - bins_.begin[c] + kGroup - 1) / kGroup;
      }
    }
    if (groups_.any()) {
      if (scratch_.groups.capacity < groups) reserve_groups(groups + groups / 2);
    } else if (scratch_.capacity < spheres) {
      reserve_spheres(spheres + spheres / 2);
    }
    if (scratch_.frame_capacity == 0) reserve_frames(1024);
    job_.runs = runs_.data();
    job_.run_count = static_cast<int64_t>(runs_.size());
    const int32_t block[3] = {row.x, row.y, z};
    for (int k = 0; k < 3; ++k) {
      job_.centre[k] = kBlock * block[k] + 0.5 * kBlock;
      job_.size[k] = min(kBlock, grid_.size[k] - kBlock * block[k]);
    }
    while (const int64_t wanted = kernels_.block(job_)) reserve_frames(wanted);
    if (voxels_.count == 0) return;
    row.blocks.push_back(
        {distances_.copy(voxels_.distance, voxels_.count), faces_.copy(voxels_.face, voxels_.count), z, {}});
    std::memcpy(row.blocks.back().mask, voxels_.mask, kBlockRows);
    for (int line = 0; line < kBlockRows; ++line) row.start[line] += __builtin_popcount(voxels_.mask[line]);
  }

  // Arrays of n + 16 elements of 4 bytes, in one buffer.
  class Arrays {
   public:
    Arrays(Buffer<uint32_t>& buffer, int64_t count, int64_t n) : size_(n + 16) {
      buffer = Buffer<uint32_t>(count * size_);
      next_ = buffer.data();
    }
    template <class T>
    void take(T*& array) {
      array = reinterpret_cast<T*>(next_);
      next_ += size_;
    }

   private:
    int64_t size_;
    uint32_t* next_;
  };

  void reserve_spheres(int64_t n) {
    Arrays arrays(spheres_, 12, n);
    for (SphereList* list : {&scratch_.block, &scratch_.octant}) {
      for (float** array : {&list->x, &list->y, &list->z, &list->r}) arrays.take(*array);
      arrays.take(list->id);
    }
    arrays.take(scratch_.frame_of);
    arrays.take(scratch_.frame_face);
    scratch_.capacity = n;
  }
  void reserve_groups(int64_t n) {
    GroupScratch& s = scratch_.groups;
    Arrays arrays(group_lists_, 3 * (kGroupFields + 1) + 5, n);
    for (GroupList* list : {&s.block, &s.octant, &s.brick}) {
      for (float*& field : list->field) arrays.take(field);
      arrays.take(list->id);
    }
    arrays.take(s.first);
    for (int32_t** array : {&s.run, &s.slot, &s.kept, &s.waiting}) arrays.take(*array);
    s.capacity = n;
  }
  void reserve_frames(int64_t n) {
    frames_ = Buffer<uint8_t>(n * kernels_.frame_bytes);
    scratch_.frames = frames_.data();
    scratch_.frame_capacity = n;
    Arrays arrays(by_frame_, 3, n);
    arrays.take(scratch_.brick);
    if (!groups_.any()) return;
    GroupScratch& s = scratch_.groups;
    members_ = Buffer<uint8_t>(n / kGroup * kMemberBytes);
    s.members = members_.data();
    arrays.take(s.frame_face);
    arrays.take(s.count);
    s.framed = s.count + n / kGroup;
  }

  const Bins& bins_;
  const Groups& groups_;
  const Grid& grid_;
  const KernelsFor<Real, Index>& kernels_;
  Job<Real, Index> job_;
  Scratch scratch_{};
  BlockVoxels<Real> voxels_;
  std::vector<Source> sources_;
  std::vector<SphereRun> runs_;
  std::vector<int32_t> step_;
  Buffer<uint32_t> spheres_, group_lists_, by_frame_;
  Buffer<uint8_t> frames_, members_;
  Arena<Real> distances_;
  Arena<uint32_t> faces_;
};

// Turns the counts of all lines into places in the output, in order of (batch, x, y); returns the total.
template <class Real>
int64_t place_lines(std::vector<BlockRow<Real>>& rows) {
  int64_t total = 0;
  for (size_t begin = 0; begin < rows.size();) {
    size_t end = begin;
    while (end < rows.size() && rows[end].batch == rows[begin].batch && rows[end].x == rows[begin].x) ++end;
    for (int x = 0; x < kBlock; ++x)
      for (size_t r = begin; r < end; ++r)
        for (int line = x * kBlock; line < (x + 1) * kBlock; ++line) {
          const int64_t count = rows[r].start[line];
          rows[r].start[line] = total;
          total += count;
        }
    begin = end;
  }
  return total;
}

template <class Real>
void write_row(BlockRow<Real>& row, Real h, const Output<Real>& out) {
  for (const Block<Real>& block : row.blocks) {
    int64_t from = 0;
    for (int line = 0; line < kBlockRows; ++line) {
      int64_t to = row.start[line];
      const int32_t x = kBlock * row.x + line / kBlock, y = kBlock * row.y + line % kBlock;
      for (unsigned mask = block.mask[line]; mask; mask &= mask - 1) {
        int32_t* c = out.coords + 4 * to;
        c[0] = row.batch, c[1] = x, c[2] = y, c[3] = kBlock * block.z + __builtin_ctz(mask);
        out.distance[to] = h * block.distance[from];
        out.face[to] = block.face[from];
        ++to, ++from;
      }
      row.start[line] = to;
    }
  }
}

}  // namespace

template <class Real, class Index>
Status narrow_band(const Mesh<Real, Index>& mesh, const int64_t* face_batch, const Grid& grid, const Kernels& kernels,
                   const Parallel& parallel, const std::function<Output<Real>(int64_t)>& allocate) {
  const auto& kernels_for = pick(kernels, Real{}, Index{});
  Bins bins = make_bins(mesh, face_batch, grid, kernels_for.spheres, parallel);
  if (bins.status != Status::ok) return bins.status;
  Groups groups = make_groups(mesh, grid, bins, kernels_for.groups, parallel);
  std::vector<BlockRow<Real>> rows = rows_in_reach<Real>(bins, grid);

  // Rows are handed out as workers ask; each result depends on its row alone.
  std::vector<std::unique_ptr<Worker<Real, Index>>> workers(static_cast<size_t>(parallel.threads));
  const int64_t voxel_limit = memory_bytes() / kBytesPerVoxel;
  std::atomic<int64_t> next_row{0}, voxels{0};
  parallel.run(parallel.threads, [&](int64_t k) {
    workers[k] = std::make_unique<Worker<Real, Index>>(mesh, bins, groups, grid, kernels_for);
    for (int64_t r; voxels < voxel_limit && (r = next_row.fetch_add(1)) < static_cast<int64_t>(rows.size());)
      voxels += workers[k]->run(rows[r]);
  });
  if (voxels >= voxel_limit) return Status::too_large;

  const bool dense = groups.any();
  bins.packed = {}, bins.face = {}, groups = {};  // room for the output
  if (dense) release_kept_pages();                // what so many triangles took would be kept on top of it
  const int64_t total = place_lines(rows);
  const Output<Real> out = allocate(total);
  advise_huge_pages(out.coords, 16 * static_cast<size_t>(total));
  advise_huge_pages(out.distance, sizeof(Real) * static_cast<size_t>(total));
  advise_huge_pages(out.face, 8 * static_cast<size_t>(total));
  std::atomic<int64_t> next_written{0};
  parallel.run(parallel.threads, [&](int64_t) {
    for (int64_t r; (r = next_written.fetch_add(1)) < static_cast<int64_t>(rows.size());)
      write_row(rows[r], static_cast<Real>(1 / grid.voxels), out);
  });
  return Status::ok;
}

#define INSTANTIATE(Real, Index)                                                                                      \
  template Status narrow_band(const Mesh<Real, Index>&, const int64_t*, const Grid&, const Kernels&, const Parallel&, \
                              const std::function<Output<Real>(int64_t)>&);
INSTANTIATE(float, int32_t)
INSTANTIATE(float, int64_t)
INSTANTIATE(double, int32_t)
INSTANTIATE(double, int64_t)

}  // namespace cvc::narrow_band
