// Writes what the steps of a merge tell, compiled once per instruction set (common/isa.h).
#include "common/isa.h"
#include "common/simd.h"
#include "voxels/keys.h"
#include "voxels/write_steps.h"

namespace cvc::voxels {
namespace {

template <bool kDetails>
struct Writer {
  const Merged out;  // a copy, which no store can change
  StepsPart at;
  int64_t lowest = 0, count = 0;  // of the voxel `id`

  template <bool has_a, bool has_b>
  void one() {
    const uint8_t step = *at.step++;
    const bool of_a = step & kOfFirst, of_b = step & kOfSecond, fresh = step & kFresh;
    at.id += fresh;
    write_voxel(of_a ? out.keys_a[at.i] : out.keys_b[at.j], out.coords + 4 * at.id);
    if (kDetails) {
      const int64_t row = of_a ? at.i : out.offset + at.j;
      out.first[at.id] = lowest = fresh ? row : lowest;
      out.counts[at.id] = count = (fresh ? 0 : count) + of_a + of_b;
    }
    // For the sake of no branch also what the step is not about: it is told again when its own step comes.
    if (has_a) out.index_a[at.i] = at.id;
    if (has_b) out.index_b[at.j] = at.id;
    at.i += of_a;
    at.j += of_b;
  }

  void all() {
    while (at.i < at.i_end && at.j < at.j_end)
      if (!eight()) one<true, true>();
    while (at.i < at.i_end)
      if (!eight()) one<true, false>();
    while (at.j < at.j_end)
      if (!eight()) one<false, true>();
    finish();
  }

#if defined(CVC_SIMD_AVX512)
  // Eight steps of eight voxels: rows of either set are spread to the lanes of their steps, and lanes packed to the
  // rows of either set. Whole lines are written past the caches: what is there need not be read first.
  static constexpr int64_t kSteps = 8;

  static bool bit_per_step(const uint8_t* step, int shift, unsigned& bits) {
    bits = _mm_movemask_epi8(_mm_slli_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(step)), shift)) & 0xFF;
    return bits == 0xFF;
  }
  static __mmask8 first_lanes(unsigned count) { return static_cast<__mmask8>(_bzhi_u32(0xFF, count)); }
  // Four voxels of eight keys: the fields of a key are its words, highest first.
  template <int first>
  static __m512i voxels(__m512i keys) {
    constexpr int k = 4 * first;
    const __m512i fields = _mm512_set_epi32(k + 12, k + 13, k + 14, k + 15, k + 8, k + 9, k + 10, k + 11,  //
                                            k + 4, k + 5, k + 6, k + 7, k, k + 1, k + 2, k + 3);
    return _mm512_maskz_permutexvar_epi16(0x55555555, fields, keys);
  }

  bool eight() {
    unsigned fresh, of_a, of_b;
    const int64_t id = at.id + 1, i_left = at.i_end - at.i, j_left = at.j_end - at.j;
    if (id % kSteps != 0 || (i_left < kSteps && j_left < kSteps)) return false;
    if (!bit_per_step(at.step, 5, fresh)) return false;
    bit_per_step(at.step, 7, of_a);
    bit_per_step(at.step, 6, of_b);
    const unsigned in_a = __builtin_popcount(of_a), in_b = __builtin_popcount(of_b);
    const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    const auto from = [lane](int64_t begin) { return _mm512_add_epi64(_mm512_set1_epi64(begin), lane); };
    const auto index = [=](int64_t* to, unsigned steps, unsigned rows) {
      _mm512_mask_storeu_epi64(to, first_lanes(rows), _mm512_maskz_compress_epi64(steps, from(id)));
    };
    index(out.index_a + at.i, of_a, in_a);
    index(out.index_b + at.j, of_b, in_b);
    const __m512i keys_b = _mm512_maskz_loadu_epi64(first_lanes(in_b), out.keys_b + at.j);
    const __m512i keys_a = _mm512_maskz_loadu_epi64(first_lanes(in_a), out.keys_a + at.i);
    const __m512i keys = _mm512_mask_expand_epi64(_mm512_maskz_expand_epi64(of_b, keys_b), of_a, keys_a);
    write(out.coords + 4 * id, voxels<0>(keys));
    write(out.coords + 4 * id + 16, voxels<4>(keys));
    if (kDetails) {
      const __m512i rows = _mm512_maskz_expand_epi64(of_b, from(out.offset + at.j));
      write(out.first + id, _mm512_mask_expand_epi64(rows, of_a, from(at.i)));
      write(out.counts + id, _mm512_mask_blend_epi64(of_a & of_b, _mm512_set1_epi64(1), _mm512_set1_epi64(2)));
      const bool last_a = of_a >> (kSteps - 1), last_b = of_b >> (kSteps - 1);
      lowest = last_a ? at.i + in_a - 1 : out.offset + at.j + in_b - 1;
      count = last_a + last_b;
    }
    at.step += kSteps;
    at.i += in_a;
    at.j += in_b;
    at.id += kSteps;
    return true;
  }

  const bool lines = ((reinterpret_cast<uintptr_t>(out.coords) | reinterpret_cast<uintptr_t>(out.counts) |
                       reinterpret_cast<uintptr_t>(out.first)) %
                      64) == 0;
  void write(void* to, __m512i line) const {
    if (lines) {
      _mm512_stream_si512(static_cast<__m512i*>(to), line);
    } else {
      _mm512_storeu_si512(to, line);
    }
  }
  void finish() const { _mm_sfence(); }
#else
  bool eight() const { return false; }
  void finish() const {}
#endif
};

}  // namespace

void CVC_ISA_NAME(write_steps)(const Merged* merged, StepsPart part) {
  if (merged->counts) {
    Writer<true>{*merged, part}.all();
  } else {
    Writer<false>{*merged, part}.all();
  }
}

}  // namespace cvc::voxels
