// Work in tasks over the threads of torch. What a task does must not depend on the thread that runs it: results are
// the same for every thread count.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <vector>

#include "common/buffer.h"

namespace cvc::voxels {

// Ranges of about `grain` rows; their number depends on n alone.
struct Chunks {
  explicit Chunks(int64_t n, int64_t grain = 1 << 14, int64_t most = 256)
      : n(n), count(std::clamp<int64_t>(n / grain, n > 0, most)) {}
  int64_t begin(int64_t chunk) const { return n / count * chunk + std::min(n % count, chunk); }
  int64_t end(int64_t chunk) const { return begin(chunk + 1); }
  int64_t n, count;
};

// Runs f(task, scratch) for every task; a thread that is done takes the next one. Every thread makes its scratch once.
template <class Make, class F>
void for_each_task(int64_t tasks, const Make& make, const F& f) {
  if (tasks <= 0) return;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  const auto work = [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      auto scratch = make();
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(task, scratch);
    }
  };
  if (threads == 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
}

// Runs f(task) for every task.
template <class F>
void for_each_task(int64_t tasks, const F& f) {
  for_each_task(tasks, [] { return nullptr; }, [&](int64_t task, std::nullptr_t) { f(task); });
}

// Runs f(begin, end) over ranges of [0, n).
template <class F>
void for_each_range(int64_t n, const F& f) {
  const Chunks chunks(n);
  for_each_task(chunks.count, [&](int64_t c) { f(chunks.begin(c), chunks.end(c)); });
}

// The same in ranges of about `grain`, where every thread goes along a stretch of its own, and those that are done help
// the others: for what lies far apart in memory, where threads that read next to each other get in each other's way.
template <class F>
void for_each_range_apart(int64_t n, int64_t grain, const F& f) {
  const Chunks chunks(n, grain, int64_t{1} << 16);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), chunks.count);
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Stretch> stretches(threads);
  for (int64_t t = 0; t < threads; ++t) {
    stretches[t].next = chunks.count * t / threads;
    stretches[t].end = chunks.count * (t + 1) / threads;
  }
  for_each_task(threads, [&](int64_t own) {
    for (int64_t k = 0; k < threads; ++k) {
      Stretch& s = stretches[(own + k) % threads];
      for (int64_t c; (c = s.next.fetch_add(1, std::memory_order_relaxed)) < s.end;) f(chunks.begin(c), chunks.end(c));
    }
  });
}

// sums[i] becomes the sum of sums[0..i); returns the total.
inline int64_t running_sums(std::vector<int64_t>& sums) {
  int64_t total = 0;
  for (int64_t& sum : sums) total += std::exchange(sum, total);
  return total;
}

// A new output tensor. Freshly faulted small pages would cost as much as the work.
inline torch::stable::Tensor new_tensor(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes,
                                        torch::headeronly::ScalarType dtype) {
  torch::stable::Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
  advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

template <class T>
T* data_of(torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace cvc::voxels
