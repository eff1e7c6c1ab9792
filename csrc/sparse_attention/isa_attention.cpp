// Attention of a panel of queries over chunks of keys with a running softmax, and its gradients.
//
// No sum depends on which thread does what: a task's order is fixed, and nobody else writes its rows.
#include <cstring>

#include "common/isa.h"
#include "sparse_attention/job.h"
#include "sparse_attention/products.h"

namespace cvc::sparse_attention {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

// Hands out pieces of a block of memory; without one, only counts.
class Arena {
 public:
  explicit Arena(unsigned char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* const piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

// Pointers to rows that vectors may read whole: the rows themselves, or padded copies where features end in mid-vector.
template <class T>
struct Readable {
  const T** at;
  T* copies;  // null: none needed
  int64_t features, stride;

  Readable(Arena& arena, int64_t rows, int64_t features)
      : at(arena.take<const T*>(rows)), copies(nullptr), features(features), stride(padded<T>(features)) {
    if (stride == features) return;
    copies = arena.take<T>(rows * stride);
    if (copies) std::memset(copies, 0, rows * stride * sizeof(T));
  }

  void set(int64_t i, const T* row) {
    at[i] = row;
    if (!copies) return;
    at[i] = static_cast<const T*>(std::memcpy(copies + i * stride, row, features * sizeof(T)));
  }
};

// Keys and values of a chunk.
template <class T>
struct Chunk {
  Readable<T> k, v;
  int64_t count = 0;

  Chunk(const Job<T>& job, Arena& arena) : k(arena, kChunk, job.dim), v(arena, kChunk, job.value_dim) {}

  void add(const Job<T>& job, int64_t position, int64_t kv_head) {
    const int64_t row = job.keys.row(position);
    k.set(count, job.k.at(row, kv_head));
    v.set(count++, job.v.at(row, kv_head));
  }
};

// Calls f() for every full chunk, and the last one, of the keys of a group.
template <class T, class F>
void for_each_chunk(const Job<T>& job, int64_t group, int64_t kv_head, Chunk<T>& chunk, const F& f) {
  chunk.count = 0;
  const int64_t listed = job.table ? job.listed : 1;
  for (int64_t j = 0; j < listed; ++j) {
    const int64_t block = job.table ? job.table[(group * job.kv_heads + kv_head) * listed + j] : group;
    if (block < 0) continue;
    for (int64_t p = job.keys.begin(block), end = p + job.keys.size(block); p < end; ++p) {
      chunk.add(job, p, kv_head);
      if (chunk.count == kChunk) {
        f();
        chunk.count = 0;
      }
    }
  }
  if (chunk.count > 0) f();
}

// Up to kPanel stacked queries: features transposed to [feature][query], zeros beyond the last one.
template <class T>
struct Panel {
  int64_t row[kPanel<T>], head[kPanel<T>];
  int64_t count = 0, width = 0;  // queries, and up to a whole vector

  void set(const Job<T>& job, int64_t group, int64_t kv_head, int64_t begin, int64_t end) {
    count = end - begin;
    width = padded<T>(count);
    for (int64_t r = 0; r < count; ++r) {
      row[r] = job.queries.row(job.queries.begin(group) + (begin + r) / job.share);
      head[r] = kv_head * job.share + (begin + r) % job.share;
    }
  }

  void transpose(const Rows<const T>& from, int64_t features, T scale, T* to) const {
    for (int64_t r = 0; r < count; ++r) {
      const T* const x = from.at(row[r], head[r]);
      for (int64_t d = 0; d < features; ++d) to[d * kPanel<T> + r] = scale * x[d];
    }
    for (int64_t d = 0; d < features; ++d)
      for (int64_t r = count; r < width; ++r) to[d * kPanel<T> + r] = 0;
  }
};

// scores[key][query] = Σ_d keys[key][d] · panel[d][query].
template <class T>
inline void score(const Readable<T>& keys, int64_t count, const T* panel, int64_t features, int64_t width, T* scores) {
  product<T, false>(
      count, width, [&](int64_t r, int64_t i) { return keys.at[r][i]; },
      [&](int64_t i) { return panel + i * kPanel<T>; }, features, scores, kPanel<T>);
}

// sums[query][..] += Σ_key weights[key][query] · rows[key][..].
template <class T>
inline void add_over_keys(const Panel<T>& panel, const T* weights, const Readable<T>& rows, int64_t count, T* sums) {
  product<T, true>(
      panel.count, rows.stride, [&](int64_t r, int64_t i) { return weights[i * kPanel<T> + r]; },
      [&](int64_t i) { return rows.at[i]; }, count, sums, rows.stride);
}

// sums[key][..] += Σ_query weights[key][query] · rows[query][..].
template <class T>
inline void add_over_queries(const Panel<T>& panel, const T* weights, const Readable<T>& rows, int64_t count, T* sums) {
  product<T, true>(
      count, rows.stride, [&](int64_t r, int64_t i) { return weights[r * kPanel<T> + i]; },
      [&](int64_t i) { return rows.at[i]; }, panel.count, sums, rows.stride);
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <class T>
struct Softmax {
  T highest[kPanel<T>], sum[kPanel<T>], factor[kPanel<T>];

  void start() {
    for (int r = 0; r < kPanel<T>; ++r) highest[r] = -kInfinity<T>, sum[r] = 0;
  }

  // Scores to weights under the maximum so far; `factor` is what earlier sums shrink by.
  void take(T* scores, int64_t count, int64_t width) {
    using V = Vec<T>;
    for (int64_t c = 0; c < width; c += kWidth<T>) {
      const V before = load<V>(highest + c);
      V top = before;
      for (int64_t k = 0; k < count; ++k) {
        const V s = load<V>(scores + k * kPanel<T> + c);
        top = top < s ? s : top;
      }
      const V shrink = before < top ? exp_of(before - top) : broadcast(T(1));
      V total = load<V>(sum + c) * shrink;
      for (int64_t k = 0; k < count; ++k) {
        T* const at = scores + k * kPanel<T> + c;
        const V weight = exp_of(load<V>(at) - top);
        store(at, weight);
        total += weight;
      }
      store(highest + c, top);
      store(sum + c, total);
      store(factor + c, shrink);
    }
  }
};

template <class T>
struct Forward {
  Chunk<T> chunk;
  T *queries, *scores, *sums;

  Forward(const Job<T>& job, Arena& arena)
      : chunk(job, arena),
        queries(arena.take<T>(job.dim * kPanel<T>)),
        scores(arena.take<T>(kChunk * kPanel<T>)),
        sums(arena.take<T>(kPanel<T> * padded<T>(job.value_dim))) {}
};

template <class T>
void forward(const Job<T>& job, const Task& task, unsigned char* scratch) {
  const int64_t width = padded<T>(job.value_dim);
  Arena arena(scratch);
  Forward<T> own(job, arena);
  Chunk<T>& chunk = own.chunk;
  T *const queries = own.queries, *const scores = own.scores, *const sums = own.sums;
  Panel<T> panel;
  Softmax<T> softmax;
  for (int64_t begin = task.begin; begin < task.end; begin += kPanel<T>) {
    panel.set(job, task.range, task.kv_head, begin, smaller(begin + kPanel<T>, task.end));
    panel.transpose(job.q, job.dim, job.scale, queries);
    softmax.start();
    std::memset(sums, 0, panel.count * width * sizeof(T));
    bool first = true;
    for_each_chunk(job, task.range, task.kv_head, chunk, [&] {
      score(chunk.k, chunk.count, queries, job.dim, panel.width, scores);
      softmax.take(scores, chunk.count, panel.width);
      if (!first)
        for (int64_t r = 0; r < panel.count; ++r)
          for (int64_t c = 0; c < width; ++c) sums[r * width + c] *= softmax.factor[r];
      first = false;
      add_over_keys(panel, scores, chunk.v, chunk.count, sums);
    });
    for (int64_t r = 0; r < panel.count; ++r) {
      T* const out = job.out.at(panel.row[r], panel.head[r]);
      const T total = softmax.sum[r], inverse = first ? T(0) : T(1) / total;
      for (int64_t c = 0; c < job.value_dim; ++c) out[c] = sums[r * width + c] * inverse;
      job.lse[panel.row[r] * job.heads() + panel.head[r]] = first ? -kInfinity<T> : softmax.highest[r] + log_of(total);
    }
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

// A panel with its gradient, and what a chunk of keys makes of them.
template <class T>
struct Backward {
  const Job<T>& job;
  Chunk<T> chunk;
  Panel<T> panel;
  Readable<T> q, grad;                    // rows
  T *queries, *grads, *weights, *scores;  // transposed panels; [key][query] P and dS
  T *of_queries, *of_keys, *of_values;    // sums
  T lse[kPanel<T>], delta[kPanel<T>] = {};

  Backward(const Job<T>& job, Arena& arena)
      : job(job),
        chunk(job, arena),
        q(arena, kPanel<T>, job.dim),
        grad(arena, kPanel<T>, job.value_dim),
        queries(arena.take<T>(job.dim * kPanel<T>)),
        grads(arena.take<T>(job.value_dim * kPanel<T>)),
        weights(arena.take<T>(kChunk * kPanel<T>)),
        scores(arena.take<T>(kChunk * kPanel<T>)),
        of_queries(arena.take<T>(kPanel<T> * q.stride)),
        of_keys(arena.take<T>(kChunk * q.stride)),
        of_values(arena.take<T>(kChunk * grad.stride)) {}

  void set(int64_t group, int64_t kv_head, int64_t begin, int64_t end) {
    panel.set(job, group, kv_head, begin, end);
    panel.transpose(job.q, job.dim, job.scale, queries);
    panel.transpose(job.grad_out, job.value_dim, T(1), grads);
    for (int64_t r = 0; r < panel.count; ++r) {
      const int64_t row = panel.row[r], head = panel.head[r], at = row * job.heads() + head;
      const T *const out = job.out.at(row, head), *const g = job.grad_out.at(row, head);
      T sum = 0;
      for (int64_t c = 0; c < job.value_dim; ++c) sum += g[c] * out[c];
      delta[r] = sum - (job.grad_lse ? job.grad_lse[at] : T(0));
      lse[r] = job.lse[at];
      q.set(r, job.q.at(row, head));
      grad.set(r, g);
    }
    for (int64_t r = panel.count; r < panel.width; ++r) lse[r] = delta[r] = 0;
  }

  // P and dS = P ∘ (dO Vᵀ − δ).
  void take() {
    using V = Vec<T>;
    score(chunk.k, chunk.count, queries, job.dim, panel.width, weights);
    score(chunk.v, chunk.count, grads, job.value_dim, panel.width, scores);
    for (int64_t c = 0; c < panel.width; c += kWidth<T>) {
      const V shift = load<V>(lse + c), mean = load<V>(delta + c);
      for (int64_t k = 0; k < chunk.count; ++k) {
        const int64_t at = k * kPanel<T> + c;
        const V weight = exp_of(load<V>(weights + at) - shift);
        store(weights + at, weight);
        store(scores + at, weight * (load<V>(scores + at) - mean));
      }
    }
  }

  void write_queries(bool add) const {
    for (int64_t r = 0; r < panel.count; ++r) {
      T* const to = job.grad_q.at(panel.row[r], panel.head[r]);
      const T* const from = of_queries + r * q.stride;
      for (int64_t d = 0; d < job.dim; ++d) to[d] = (add ? to[d] : T(0)) + job.scale * from[d];
    }
  }
};

template <class T>
int64_t scratch_bytes(const Job<T>& job) {
  Arena forward(nullptr), backward(nullptr);
  const Forward<T> a(job, forward);
  const Backward<T> b(job, backward);
  return forward.used() < backward.used() ? backward.used() : forward.used();
}

template <class T>
void query_gradient(const Job<T>& job, const Task& task, unsigned char* scratch) {
  Arena arena(scratch);
  Backward<T> b(job, arena);
  for (int64_t begin = task.begin; begin < task.end; begin += kPanel<T>) {
    b.set(task.range, task.kv_head, begin, smaller(begin + kPanel<T>, task.end));
    std::memset(b.of_queries, 0, kPanel<T> * b.q.stride * sizeof(T));
    for_each_chunk(job, task.range, task.kv_head, b.chunk, [&] {
      b.take();
      add_over_keys(b.panel, b.scores, b.chunk.k, b.chunk.count, b.of_queries);
    });
    b.write_queries(false);
  }
}

template <class T>
void key_gradient(const Job<T>& job, const Task& task, const Readers& readers, bool and_queries,
                  unsigned char* scratch) {
  Arena arena(scratch);
  Backward<T> b(job, arena);
  Chunk<T>& chunk = b.chunk;
  const int64_t first = job.keys.begin(task.range);
  for (int64_t begin = task.begin; begin < task.end; begin += kChunk) {
    const int64_t end = smaller(begin + kChunk, task.end);
    chunk.count = 0;
    for (int64_t p = begin; p < end; ++p) chunk.add(job, first + p, task.kv_head);
    std::memset(b.of_keys, 0, chunk.count * b.q.stride * sizeof(T));
    std::memset(b.of_values, 0, chunk.count * b.grad.stride * sizeof(T));
    for (int64_t j = 0; j < readers.count; ++j) {
      const int64_t group = readers.group[j], stacked = job.stacked(group);
      for (int64_t at = 0; at < stacked; at += kPanel<T>) {
        b.set(group, task.kv_head, at, smaller(at + kPanel<T>, stacked));
        b.take();
        add_over_queries(b.panel, b.weights, b.grad, chunk.count, b.of_values);
        add_over_queries(b.panel, b.scores, b.q, chunk.count, b.of_keys);
        if (!and_queries) continue;
        std::memset(b.of_queries, 0, kPanel<T> * b.q.stride * sizeof(T));
        add_over_keys(b.panel, b.scores, chunk.k, chunk.count, b.of_queries);
        b.write_queries(begin > task.begin);
      }
    }
    for (int64_t k = 0; k < chunk.count; ++k) {
      const int64_t row = job.keys.row(first + begin + k);
      T *const to_k = job.grad_k.at(row, task.kv_head), *const to_v = job.grad_v.at(row, task.kv_head);
      for (int64_t d = 0; d < job.dim; ++d) to_k[d] = job.scale * b.of_keys[k * b.q.stride + d];
      std::memcpy(to_v, b.of_values + k * b.grad.stride, job.value_dim * sizeof(T));
    }
  }
}

constexpr AttentionKernels kKernels = {
    {scratch_bytes<float>, forward<float>, query_gradient<float>, key_gradient<float>},
    {scratch_bytes<double>, forward<double>, query_gradient<double>, key_gradient<double>},
};

}  // namespace

const AttentionKernels& CVC_ISA_NAME(attention_kernels)() { return kKernels; }

}  // namespace cvc::sparse_attention
