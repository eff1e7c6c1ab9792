// Attention of groups of queries over blocks of keys on the CPU, as the kernels of isa_attention.cpp see it.
#pragma once

#include <cstdint>

namespace cvc::sparse_attention {

// Members that are not inlined would be merged with their twins of another instruction set.
#define CVC_INLINE [[gnu::always_inline]]

// [rows, heads, features], features adjacent.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t row_stride = 0, head_stride = 0;

  CVC_INLINE T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// Positions [offsets[g], offsets[g + 1]) of group g; a position's row is rows[position], or itself.
struct Ranges {
  const int64_t* offsets;
  const int64_t* rows;  // or null
  int64_t count;

  CVC_INLINE int64_t begin(int64_t i) const { return offsets[i]; }
  CVC_INLINE int64_t size(int64_t i) const { return offsets[i + 1] - offsets[i]; }
  CVC_INLINE int64_t row(int64_t position) const { return rows ? rows[position] : position; }
};

template <class T>
struct Job {
  Rows<const T> q, k, v;
  Ranges queries, keys;
  const int32_t* table;  // [groups, kv_heads, listed], −1 for none; null: group g has block g
  int64_t listed;
  int64_t kv_heads, share;  // heads of the keys; query heads that share one
  int64_t dim, value_dim;
  T scale;
  Rows<T> out;
  T* lse;  // [rows, kv_heads * share]

  // Of the backward pass.
  Rows<const T> grad_out;
  const T* grad_lse;  // like lse, or null
  Rows<T> grad_q, grad_k, grad_v;

  CVC_INLINE int64_t heads() const { return kv_heads * share; }
  // A group's queries under the heads that share one of the keys', head fastest.
  CVC_INLINE int64_t stacked(int64_t group) const { return queries.size(group) * share; }
};

// Stacked queries [begin, end) of a group, or keys [begin, end) of a block; of one head of the keys.
struct Task {
  int64_t range, kv_head, begin, end;
};

// The groups that attend to a block under one head of the keys, ascending.
struct Readers {
  const int32_t* group;
  int64_t count;
};

template <class T>
struct Kernels {
  // What each of the others needs.
  int64_t (*scratch_bytes)(const Job<T>& job);
  // out and lse of stacked queries.
  void (*forward)(const Job<T>& job, const Task& task, unsigned char* scratch);
  // grad_q of stacked queries.
  void (*query_gradient)(const Job<T>& job, const Task& task, unsigned char* scratch);
  // grad_k and grad_v of keys; with `and_queries` their share of grad_q is added, which must be nobody else's
  // meanwhile.
  void (*key_gradient)(const Job<T>& job, const Task& task, const Readers& readers, bool and_queries,
                       unsigned char* scratch);
};

struct AttentionKernels {
  Kernels<float> of_float;
  Kernels<double> of_double;
};

const AttentionKernels& attention_kernels_baseline();
const AttentionKernels& attention_kernels_avx2();
const AttentionKernels& attention_kernels_avx512();

#undef CVC_INLINE

}  // namespace cvc::sparse_attention
