// What `from_dense` must move and nothing else: one number of every line of the cache that holds a voxel, in each
// channel; the coordinates; the rows. What it adds up and writes means nothing.
//
// Lines are fetched as many ahead as proved best, and every channel one line behind the one before: at the same place
// of several channels memory answers one after the other. Every thread has a stretch of its own.
#include <emmintrin.h>

#include <algorithm>
#include <cstdint>

extern "C" float touch_lines(const float* dense, int64_t channels, int64_t channel, const int64_t* lines, int64_t count,
                             const int32_t* coords, float* rows, int64_t voxels, int threads) {
  constexpr int64_t kAhead = 16, kStep = 4, kGroup = 8;
  float sum = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : sum)
  for (int t = 0; t < threads; ++t) {
    const int64_t begin = count * t / threads, end = count * (t + 1) / threads;
    const auto part = [&](int64_t of, int64_t line) { return of * line / count / 16 * 16; };  // whole lines of it
    for (int64_t at = begin; at < end; at += kStep) {
      const int64_t stop = std::min(at + kStep, end);
      for (int64_t first = 0; first < channels; first += kGroup) {
        const int64_t last = std::min(first + kGroup, channels);
        for (int64_t k = at; k < stop; ++k) {
          for (int64_t c = first; c < last; ++c)
            __builtin_prefetch(dense + c * channel + lines[std::min(k + kAhead + c - first, count - 1)], 0, 2);
          for (int64_t c = first; c < last; ++c) sum += dense[c * channel + lines[k]];
        }
      }
      __m128i read = _mm_setzero_si128();
      for (int64_t k = part(4 * voxels, at); k < part(4 * voxels, stop); k += 4) {
        __builtin_prefetch(coords + k + 4096, 0, 2);
        read = _mm_add_epi32(read, _mm_loadu_si128(reinterpret_cast<const __m128i*>(coords + k)));
      }
      for (int64_t k = part(channels * voxels, at); k < part(channels * voxels, stop); k += 4)
        _mm_stream_ps(rows + k, _mm_castsi128_ps(read));
    }
    _mm_sfence();
  }
  return sum;
}
