// Loops over the cells of a box, compiled once per instruction set (common/isa.h).
//
// Outputs are made block by block in a core's cache and from there written past the caches: what was there need not be
// read first.
#include "common/isa.h"
#include "common/simd.h"
#include "voxels/cell_kernels.h"

namespace cvc::voxels {
namespace {

constexpr int64_t kBlock = 256;

// Copies whole lines of 64 bytes past the caches.
inline void stream_line(char* to, const char* from) {
#if defined(CVC_SIMD_AVX512)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__SSE2__)
  for (int k = 0; k < 64; k += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k)));
#else
  __builtin_memcpy(to, from, 64);
#endif
}

template <class T>
inline void stream(const T* from, int64_t n, T* to) {
  const char* source = reinterpret_cast<const char*>(from);
  char* target = reinterpret_cast<char*>(to);
  int64_t left = n * static_cast<int64_t>(sizeof(T));
  int64_t lead = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63);
  lead = lead < left ? lead : left;
  __builtin_memcpy(target, source, lead);
  for (source += lead, target += lead, left -= lead; left >= 64; source += 64, target += 64, left -= 64)
    stream_line(target, source);
  __builtin_memcpy(target, source, left);
}

// What was streamed is there for other threads.
inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Calls make(begin, count, block) for every block, and streams what it makes: `width` numbers of each item.
template <int width, class T, class Make>
inline void stream_blocks(int64_t n, T* to, const Make& make) {
  alignas(64) T block[kBlock * width];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = n - begin < kBlock ? n - begin : kBlock;
    make(begin, count, block);
    stream(block, count * width, to + begin * width);
  }
  finish_streams();
}

// The quotient of numbers in [0, 2^31): half a unit is far more than what rounding takes away.
struct Divisor {
  explicit Divisor(int32_t value) : inverse(1.0 / value) {}
  int32_t operator()(int32_t number) const { return static_cast<int32_t>((number + 0.5) * inverse); }
  double inverse;
};

void voxels_of(const NarrowBox& box, int32_t first, const uint32_t* cells, int64_t n, int32_t* coords) {
  const Divisor by_line(box.line), by_plane(box.plane), by_batch(box.batch);
  const NarrowBox b = box;
  stream_blocks<4>(n, coords, [&](int64_t begin, int64_t count, int32_t* block) {
    for (int64_t k = 0; k < count; ++k) {
      const int32_t cell = first + static_cast<int32_t>(cells[begin + k]);
      const int32_t lines = by_line(cell), planes = by_plane(cell), batches = by_batch(cell);
      block[4 * k] = b.low[0] + batches;
      block[4 * k + 1] = b.low[1] + planes - batches * (b.batch / b.plane);
      block[4 * k + 2] = b.low[2] + lines - planes * (b.plane / b.line);
      block[4 * k + 3] = b.low[3] + cell - lines * b.line;
    }
  });
}

int64_t bits_before(const uint64_t* words, int64_t n, uint32_t* before) {
  uint32_t sum = 0;
  int64_t w = 0;
#if defined(CVC_SIMD_AVX512)
  // Eight words at a time: bits of half bytes from a table, summed within words, then over words by doubling.
  const __m512i bits_of = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i half_byte = _mm512_set1_epi8(0xF), none = _mm512_setzero_si512();
  const __m512i last = _mm512_set1_epi64(7);
  __m512i sums = none;  // of all words so far, in every lane
  for (; n - w >= 8; w += 8) {
    const __m512i group = _mm512_loadu_si512(words + w);
    const __m512i low = _mm512_shuffle_epi8(bits_of, _mm512_and_si512(group, half_byte));
    const __m512i high = _mm512_shuffle_epi8(bits_of, _mm512_and_si512(_mm512_srli_epi64(group, 4), half_byte));
    __m512i until = _mm512_sad_epu8(_mm512_add_epi8(low, high), none);
    const __m512i own = until;
    until = _mm512_add_epi64(until, _mm512_alignr_epi64(until, none, 7));
    until = _mm512_add_epi64(until, _mm512_alignr_epi64(until, none, 6));
    until = _mm512_add_epi64(until, _mm512_alignr_epi64(until, none, 4));
    const __m256i before_group = _mm512_cvtepi64_epi32(_mm512_add_epi64(sums, _mm512_sub_epi64(until, own)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(before + w), before_group);
    sums = _mm512_add_epi64(sums, _mm512_permutexvar_epi64(last, until));
  }
  sum = static_cast<uint32_t>(_mm_cvtsi128_si64(_mm512_castsi512_si128(sums)));
#endif
  for (; w < n; ++w) {
    before[w] = sum;
    sum += static_cast<uint32_t>(__builtin_popcountll(words[w]));
  }
  return sum;
}

void widen(const uint32_t* from, int64_t n, int64_t* to) {
  stream_blocks<1>(n, to, [=](int64_t begin, int64_t count, int64_t* block) {
    for (int64_t k = 0; k < count; ++k) block[k] = from[begin + k];
  });
}

constexpr CellKernels kKernels{voxels_of, bits_before, widen};

}  // namespace

const CellKernels* CVC_ISA_NAME(cell_kernels)() { return &kKernels; }

}  // namespace cvc::voxels
