#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "sparse_attention/job.h"
#include "voxels/tasks.h"

namespace cvc::sparse_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using voxels::for_each_task;
using voxels::new_tensor;

// Of a task: stacked queries, and keys where a block is shared out.
constexpr int64_t kQueries = 256, kKeys = 128;
// With so many (group, head) pairs each can be one task of the backward pass, and scores are formed once.
constexpr int64_t kManyGroups = 32;

const AttentionKernels& kernels() { return CVC_ISA_PICK(attention_kernels)(); }

template <class T>
const Kernels<T>& kernels_of() {
  if constexpr (sizeof(T) == sizeof(double))
    return kernels().of_double;
  else
    return kernels().of_float;
}

template <class T>
Rows<T> rows_of(const Tensor& t) {
  T* const data = const_cast<T*>(static_cast<const T*>(t.const_data_ptr()));
  return {data, t.stride(0), t.stride(1)};
}

const int64_t* indices(const std::optional<Tensor>& t) {
  return t ? static_cast<const int64_t*>(t->const_data_ptr()) : nullptr;
}

Ranges ranges_of(const Tensor& offsets, const std::optional<Tensor>& rows) {
  return {static_cast<const int64_t*>(offsets.const_data_ptr()), indices(rows), offsets.size(0) - 1};
}

template <class T>
Job<T> make_job(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& rows_q,
                const std::optional<Tensor>& rows_k, const Tensor& offsets_q, const Tensor& offsets_k,
                const std::optional<Tensor>& table, double scale, const Tensor& out, const Tensor& lse) {
  Job<T> job{};
  job.q = rows_of<const T>(q), job.k = rows_of<const T>(k), job.v = rows_of<const T>(v);
  job.queries = ranges_of(offsets_q, rows_q), job.keys = ranges_of(offsets_k, rows_k);
  static constexpr int32_t kEmpty = -1;  // an empty table has no address, and still is one
  job.table = !table ? nullptr : table->numel() ? static_cast<const int32_t*>(table->const_data_ptr()) : &kEmpty;
  job.listed = table ? table->size(2) : 1;
  job.kv_heads = k.size(1), job.share = q.size(1) / k.size(1);
  job.dim = q.size(2), job.value_dim = v.size(2);
  job.scale = static_cast<T>(scale);
  job.out = rows_of<T>(out);
  job.lse = rows_of<T>(lse).data;
  return job;
}

// Cuts [0, size(range)) of every range into tasks of at most `most`.
template <class F>
std::vector<Task> cut(int64_t ranges, int64_t kv_heads, int64_t most, F size) {
  std::vector<Task> tasks;
  tasks.reserve(ranges * kv_heads);
  for (int64_t range = 0; range < ranges; ++range)
    for (int64_t head = 0; head < kv_heads; ++head)
      for (int64_t begin = 0, all = size(range); begin < all; begin += most)
        tasks.push_back({range, head, begin, std::min(begin + most, all)});
  return tasks;
}

// Runs f(task, scratch), a few tasks at a time where they are many and small.
template <class T, class F>
void run(const Job<T>& job, const std::vector<Task>& tasks, const F& f) {
  const int64_t count = static_cast<int64_t>(tasks.size()), each = std::clamp<int64_t>(count / 256, 1, 32);
  const int64_t bytes = kernels_of<T>().scratch_bytes(job);
  for_each_task((count + each - 1) / each, [&](int64_t some) {
    const Buffer<unsigned char> scratch(bytes);
    for (int64_t i = some * each, end = std::min(i + each, count); i < end; ++i) f(tasks[i], scratch.data());
  });
}

template <class T>
std::vector<Task> query_tasks(const Job<T>& job) {
  return cut(job.queries.count, job.kv_heads, kQueries, [&](int64_t group) { return job.stacked(group); });
}

template <class T>
std::tuple<Tensor, Tensor> forward(const Job<T>& job, Tensor out, Tensor lse) {
  run(job, query_tasks(job),
      [&](const Task& task, unsigned char* scratch) { kernels_of<T>().forward(job, task, scratch); });
  return {out, lse};
}

std::tuple<Tensor, Tensor> ragged_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> rows_q,
                                            std::optional<Tensor> rows_k, Tensor offsets_q, Tensor offsets_k,
                                            std::optional<Tensor> table, double scale) {
  Tensor out = new_tensor(q, {q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  Tensor lse = new_tensor(q, {q.size(0), q.size(1)}, q.scalar_type());
  const auto run_as = [&](auto real) {
    using T = decltype(real);
    return forward(make_job<T>(q, k, v, rows_q, rows_k, offsets_q, offsets_k, table, scale, out, lse), out, lse);
  };
  return q.scalar_type() == ScalarType::Double ? run_as(double{}) : run_as(float{});
}

// For every block and head of the keys the groups that list it, ascending; without a table, the group of its number.
template <class T>
struct AllReaders {
  std::vector<int64_t> first;
  std::vector<int32_t> groups;

  explicit AllReaders(const Job<T>& job) : first(job.keys.count * job.kv_heads + 1) {
    const int64_t pairs = job.queries.count * job.kv_heads;
    const auto at = [&](int64_t pair, int64_t j) -> int64_t {
      const int64_t block = job.table ? job.table[pair * job.listed + j] : pair / job.kv_heads;
      return block < 0 ? -1 : block * job.kv_heads + pair % job.kv_heads;
    };
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t j = 0; j < job.listed; ++j)
        if (at(pair, j) >= 0) ++first[at(pair, j)];
    groups.resize(voxels::running_sums(first));
    std::vector<int64_t> next = first;
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t j = 0; j < job.listed; ++j)
        if (at(pair, j) >= 0) groups[next[at(pair, j)]++] = static_cast<int32_t>(pair / job.kv_heads);
  }
  Readers of(int64_t block, int64_t kv_head, int64_t kv_heads) const {
    const int64_t i = block * kv_heads + kv_head;
    return {groups.data() + first[i], first[i + 1] - first[i]};
  }
};

template <class T>
void backward(const Job<T>& job) {
  const AllReaders<T> readers(job);
  const bool once = !job.table && job.queries.count * job.kv_heads >= kManyGroups;
  if (!once)
    run(job, query_tasks(job),
        [&](const Task& task, unsigned char* scratch) { kernels_of<T>().query_gradient(job, task, scratch); });
  const int64_t most = once ? INT64_MAX / 2 : kKeys;
  run(job, cut(job.keys.count, job.kv_heads, most, [&](int64_t block) { return job.keys.size(block); }),
      [&](const Task& task, unsigned char* scratch) {
        const Readers own = readers.of(task.range, task.kv_head, job.kv_heads);
        kernels_of<T>().key_gradient(job, task, own, once, scratch);
      });
}

std::tuple<Tensor, Tensor, Tensor> ragged_attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse,
                                                             Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                                                             std::optional<Tensor> rows_q, std::optional<Tensor> rows_k,
                                                             Tensor offsets_q, Tensor offsets_k,
                                                             std::optional<Tensor> table, double scale) {
  Tensor grad_q = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor grad_k = new_tensor(k, {k.size(0), k.size(1), k.size(2)}, k.scalar_type());
  Tensor grad_v = new_tensor(v, {v.size(0), v.size(1), v.size(2)}, v.scalar_type());
  torch::stable::zero_(grad_q);  // queries without keys
  const auto run_as = [&](auto real) {
    using T = decltype(real);
    Job<T> job = make_job<T>(q, k, v, rows_q, rows_k, offsets_q, offsets_k, table, scale, out, lse);
    job.grad_out = rows_of<const T>(grad_out);
    job.grad_lse = grad_lse ? rows_of<T>(*grad_lse).data : nullptr;
    job.grad_q = rows_of<T>(grad_q), job.grad_k = rows_of<T>(grad_k), job.grad_v = rows_of<T>(grad_v);
    backward(job);
  };
  q.scalar_type() == ScalarType::Double ? run_as(double{}) : run_as(float{});
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace cvc::sparse_attention

// q, k, v, out and grad_out have adjacent features; lse and indices are contiguous; offsets ascend, rows are
// permutations and tables hold blocks: Python sees to it.
STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def(
      "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor? rows_q, Tensor? rows_k, Tensor offsets_q, "
      "Tensor offsets_k, Tensor? table, float scale) -> (Tensor, Tensor)");
  m.def(
      "ragged_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k, "
      "Tensor v, Tensor? rows_q, Tensor? rows_k, Tensor offsets_q, Tensor offsets_k, Tensor? table, float scale) -> "
      "(Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("ragged_attention", TORCH_BOX(&cvc::sparse_attention::ragged_attention));
  m.impl("ragged_attention_backward", TORCH_BOX(&cvc::sparse_attention::ragged_attention_backward));
}
