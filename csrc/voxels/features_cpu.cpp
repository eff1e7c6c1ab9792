// Rows of features between sets of voxels: gather with absent rows, and reductions of what shares a row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <limits>
#include <tuple>

#include "voxels/deal.h"
#include "voxels/fetch.h"
#include "voxels/fill.h"
#include "voxels/join.h"
#include "voxels/keys.h"
#include "voxels/tasks.h"

namespace cvc::voxels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- gather ----------------------------------------------------------------------------------------------------------

// Copies rows of `bytes` bytes; the common sizes as constants, so that a copy is a few moves and no call.
template <size_t kBytes>
bool gather_rows(const char* feats, int64_t n, const int64_t* index, int64_t m, size_t bytes, const char* fill,
                 char* out) {
  constexpr int64_t kAhead = 24;
  std::atomic<bool> ok{true};
  const size_t size = kBytes ? kBytes : bytes;
  for_each_range(m, [&](int64_t begin, int64_t end) {
    bool fine = true;
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end) {
        const int64_t next = index[i + kAhead];
        if (static_cast<uint64_t>(next) < static_cast<uint64_t>(n)) fetch_row(feats + next * size, size);
      }
      const int64_t row = index[i];
      const bool present = static_cast<uint64_t>(row) < static_cast<uint64_t>(n);
      fine &= present || row == -1;
      std::memcpy(out + i * size, present ? feats + row * size : fill, size);
    }
    if (!fine) ok.store(false, std::memory_order_relaxed);
  });
  return ok.load();
}

std::tuple<Tensor, bool> gather_features(Tensor feats, Tensor index, double fill) {
  const int64_t n = feats.size(0), channels = feats.size(1), m = index.size(0);
  Tensor out = new_tensor(feats, {m, channels}, feats.scalar_type());
  const size_t bytes = channels * feats.element_size();
  std::vector<char> absent(bytes + 1);
  fill_row(feats.scalar_type(), fill, channels, absent.data());
  const auto run = [&](auto kernel) {
    return kernel(static_cast<const char*>(feats.const_data_ptr()), n,
                  static_cast<const int64_t*>(index.const_data_ptr()), m, bytes, absent.data(), data_of<char>(out));
  };
  switch (bytes) {
    case 2: return {out, run(gather_rows<2>)};
    case 4: return {out, run(gather_rows<4>)};
    case 8: return {out, run(gather_rows<8>)};
    case 16: return {out, run(gather_rows<16>)};
    case 32: return {out, run(gather_rows<32>)};
    case 64: return {out, run(gather_rows<64>)};
    case 128: return {out, run(gather_rows<128>)};
    default: return {out, run(gather_rows<0>)};
  }
}

// --- scatter ---------------------------------------------------------------------------------------------------------

// The row that goes to every row of the result, or -1. Returns kOutOfRange for an index outside [-1, rows), kDuplicate
// where two rows go to one.
std::tuple<Tensor, int64_t> invert_index(Tensor index, int64_t rows) {
  const int64_t n = index.size(0);
  const int64_t* const to = static_cast<const int64_t*>(index.const_data_ptr());
  Tensor inverse = new_tensor(index, {rows}, ScalarType::Long);
  int64_t* const from = data_of<int64_t>(inverse);
  for_each_range(rows,
                 [&](int64_t begin, int64_t end) { std::memset(from + begin, 0xFF, (end - begin) * sizeof *from); });
  std::atomic<bool> fine{true};
  std::atomic<int64_t> given{0}, taken{0};
  for_each_range(n, [&](int64_t begin, int64_t end) {
    bool good = true;
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) {
      const bool inside = static_cast<uint64_t>(to[i]) < static_cast<uint64_t>(rows);
      good &= inside || to[i] == -1;
      if (!inside) continue;
      std::atomic_ref<int64_t>(from[to[i]]).store(i, std::memory_order_relaxed);
      ++count;
    }
    given.fetch_add(count, std::memory_order_relaxed);
    if (!good) fine.store(false, std::memory_order_relaxed);
  });
  if (!fine.load()) return {inverse, kOutOfRange};
  for_each_range(rows, [&](int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += from[i] >= 0;
    taken.fetch_add(count, std::memory_order_relaxed);
  });
  return {inverse, taken.load() == given.load() ? 0 : int64_t{kDuplicate}};
}

// --- reduce ----------------------------------------------------------------------------------------------------------
//
// Every task owns a range of result rows and visits the given rows that go there, in their order: no two tasks write
// one row, and sums do not depend on the threads. Blocks of rows know the range of their indices, so that a map that
// is almost in order (that of `downsample`) is read once; for a scattered one, rows are first dealt out to the tasks.

constexpr int64_t kBlock = 2048;

struct IndexBlocks {
  IndexBlocks(const int64_t* index, int64_t n, int64_t num_rows) : low((n + kBlock - 1) / kBlock), high(low.size()) {
    std::atomic<bool> fine{true};
    for_each_range(static_cast<int64_t>(low.size()), [&](int64_t begin, int64_t end) {
      bool good = true;
      for (int64_t b = begin; b < end; ++b) {
        int64_t least = std::numeric_limits<int64_t>::max(), most = -1;
        for (int64_t i = b * kBlock; i < std::min(n, (b + 1) * kBlock); ++i) {
          good &= static_cast<uint64_t>(index[i] + 1) <= static_cast<uint64_t>(num_rows);
          least = index[i] >= 0 ? std::min(least, index[i]) : least;
          most = std::max(most, index[i]);
        }
        low[b] = least;
        high[b] = most;
      }
      if (!good) fine.store(false, std::memory_order_relaxed);
    });
    ok = fine.load();
  }
  std::vector<int64_t> low, high;
  bool ok;
};

template <class T>
bool reduce(const Tensor& feats, const int64_t* index, int64_t num_rows, Reduction reduction, bool include_self,
            Tensor& result) {
  const int64_t n = feats.size(0), channels = feats.size(1);
  const T* const in = static_cast<const T*>(feats.const_data_ptr());
  T* const out = data_of<T>(result);
  const IndexBlocks blocks(index, n, num_rows);
  if (!blocks.ok) return false;

  const Parts parts(num_rows, (1 << 16) / std::max<int64_t>(channels, 1));
  const auto work = [&](int64_t part, const auto& each) {
    const int64_t begin = parts.begin(part), end = parts.end(part);
    start_rows(out + begin * channels, (end - begin) * channels, reduction, include_self);
    std::vector<int32_t> counts(end - begin, 0);
    // By value: stores of rows might change what is behind a reference.
    const auto join = [=, count = counts.data() - begin](auto max, int64_t row) {
      const int64_t to = index[row];
      join_row<decltype(max)::value>(in + row * channels, channels, out + to * channels);
      ++count[to];
    };
    if (reduction == Reduction::max) {
      each(begin, end, [=](int64_t row) { join(std::true_type(), row); });
    } else {
      each(begin, end, [=](int64_t row) { join(std::false_type(), row); });
    }
    for (int64_t i = begin; i < end; ++i) {
      T* const row = out + i * channels;
      finish_row(row, channels, reduction, counts[i - begin], include_self, row);
    }
  };

  // How many rows would be read if every task went through all blocks that may concern it?
  int64_t visits = 0;
  for (size_t b = 0; b < blocks.low.size(); ++b)
    if (blocks.high[b] >= 0) visits += kBlock * (parts.of(blocks.high[b] - blocks.low[b]) + 2);
  if (visits <= 4 * n + 4 * kBlock) {
    for_each_task(parts.count, [&](int64_t part) {
      work(part, [&](int64_t begin, int64_t end, const auto& visit) {
        for (size_t b = 0; b < blocks.low.size(); ++b) {
          if (blocks.high[b] < begin || blocks.low[b] >= end) continue;
          const int64_t last = std::min<int64_t>(n, (b + 1) * kBlock);
          for (int64_t i = b * kBlock; i < last; ++i)
            if (index[i] >= begin && index[i] < end) visit(i);
        }
      });
    });
    return true;
  }

  const auto dealt = deal_out<int64_t>(
      n, parts,
      [&](int64_t begin, int64_t end, const auto& see) {
        for (int64_t i = begin; i < end; ++i) see(index[i]);
      },
      [&](int64_t begin, int64_t end, const auto& give) {
        for (int64_t i = begin; i < end; ++i) give(index[i], i);
      });
  for_each_task(parts.count, [&](int64_t part) {
    work(part, [&](int64_t, int64_t, const auto& visit) {
      constexpr int64_t kAhead = 16;
      const int64_t last = dealt.first[part + 1];
      for (int64_t k = dealt.first[part]; k < last; ++k) {
        if (k + kAhead < last) fetch_row(in + dealt.items[k + kAhead] * channels, channels * sizeof(T));
        visit(dealt.items[k]);
      }
    });
  });
  return true;
}

}  // namespace

std::tuple<Tensor, bool> reduce_features(Tensor feats, Tensor index, int64_t num_rows, int64_t reduction,
                                         bool include_self) {
  Tensor out = new_tensor(feats, {num_rows, feats.size(1)}, feats.scalar_type());
  const int64_t* const rows = static_cast<const int64_t*>(index.const_data_ptr());
  const Reduction kind = static_cast<Reduction>(reduction);
  const bool ok = feats.scalar_type() == ScalarType::Double
                      ? reduce<double>(feats, rows, num_rows, kind, include_self, out)
                      : reduce<float>(feats, rows, num_rows, kind, include_self, out);
  return {out, ok};
}

}  // namespace cvc::voxels

STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def("gather_features(Tensor feats, Tensor index, float fill) -> (Tensor, bool)");
  m.def("invert_index(Tensor index, int rows) -> (Tensor, int)");
  m.def(
      "reduce_features(Tensor feats, Tensor index, int num_rows, int reduction, bool include_self) -> (Tensor, bool)");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("gather_features", TORCH_BOX(&cvc::voxels::gather_features));
  m.impl("invert_index", TORCH_BOX(&cvc::voxels::invert_index));
  m.impl("reduce_features", TORCH_BOX(&cvc::voxels::reduce_features));
}
