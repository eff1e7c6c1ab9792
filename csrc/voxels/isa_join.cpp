// Sums and maxima of rows, compiled once per instruction set (common/isa.h).
#include "common/isa.h"
#include "common/simd.h"
#include "voxels/join_rows.h"
#include "voxels/join_vectors.h"

namespace cvc::voxels {
namespace {

// Calls f(vector of zeros, c) for the channels c … of whole vectors, then of short ones, then one by one.
template <class T, class F>
inline void for_each_vector(int64_t channels, F f) {
  constexpr int64_t kShort = 16 / sizeof(T);
  int64_t c = 0;
  for (; c + kWidth<T> <= channels; c += kWidth<T>) f(Vec<T>{}, c);
  if constexpr (kWidth<T> > kShort)
    for (; c + kShort <= channels; c += kShort) f(Vec<T, kShort>{}, c);
  for (; c < channels; ++c) f(Vec<T, 1>{}, c);
}

template <class T, bool kMax>
void join_rows(const JoinRows& job) {
  const int64_t channels = job.channels;
  const T* const rows = static_cast<const T*>(job.rows);
  T* const sums = static_cast<T*>(job.sums);
  for (int64_t i = 0; i < job.count; ++i) {
    const T* const row = rows + i * channels;
    T* const sum = sums + job.to[i] * channels;
    for (int64_t b = 0; b < channels * static_cast<int64_t>(sizeof(T)); b += 64)
      fetch_ahead(reinterpret_cast<const char*>(row) + b);
    for_each_vector<T>(channels, [=](auto zero, int64_t c) {
      using V = decltype(zero);
      store(sum + c, join<kMax>(load<V>(sum + c), load<V>(row + c)));
    });
  }
}

template <class T, bool kStream>
void finish_rows(const FinishRows& job) {
  const int64_t channels = job.channels;
  for (int64_t i = 0; i < job.count; ++i) {
    const T* const sum = static_cast<const T*>(job.sums) + i * channels;
    T* const out = static_cast<T*>(job.out) + i * channels;
    const auto put = [=](auto f) {
      for_each_vector<T>(channels, [=](auto zero, int64_t c) {
        using V = decltype(zero);
        const V v = f(load<V>(sum + c));
        if constexpr (kStream && sizeof(V) == kVectorBytes) {
          stream(out + c, v);
        } else {
          store(out + c, v);
        }
      });
    };
    const uint32_t divisor = job.divisors ? job.divisors[i] : 1;
    const T by = static_cast<T>(divisor), inverse = T(1) / by;
    if (divisor == 1) {
      put([](auto v) { return v; });
    } else if ((divisor & (divisor - 1)) == 0) {  // exactly the quotient, without the divider
      put([=](auto v) { return v * inverse; });
    } else {
      put([=](auto v) { return v / by; });
    }
  }
#if defined(__x86_64__)
  if (kStream) _mm_sfence();
#endif
}

template <class T>
void finish_rows(const FinishRows& job) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(job.out) | static_cast<uintptr_t>(job.channels * sizeof(T));
  job.large&& bits % 64 == 0 ? finish_rows<T, true>(job) : finish_rows<T, false>(job);
}

void join_any(const JoinRows& job) {
  if (job.is_double) {
    job.is_max ? join_rows<double, true>(job) : join_rows<double, false>(job);
  } else {
    job.is_max ? join_rows<float, true>(job) : join_rows<float, false>(job);
  }
}

void finish_any(const FinishRows& job) { job.is_double ? finish_rows<double>(job) : finish_rows<float>(job); }

}  // namespace

RowKernels CVC_ISA_NAME(row_kernels)() { return {join_any, finish_any}; }

}  // namespace cvc::voxels
