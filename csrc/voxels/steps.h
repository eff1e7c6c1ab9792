// The merge of two ascending lists of keys as a list of its steps. To find the steps is all that has to wait for
// comparisons; what they tell to write can then be written in order, each output once.
#pragma once

#include "voxels/merge.h"
#include "voxels/write_steps.h"

namespace cvc::voxels {

inline int64_t count_fresh(const uint8_t* begin, const uint8_t* end) {
  int64_t count = 0;
  for (const uint8_t* step = begin; step < end; ++step) count += *step / kFresh;
  return count;
}

// A merge on its way, of lists that may repeat keys, or of lists without, whose steps are all fresh.
template <bool kRepeats>
struct Merge {
  const uint64_t *a, *a_end, *b, *b_end;
  uint8_t* steps;
  uint64_t before = kNoKey;

  // So many steps may be made without a look at the ends.
  int64_t safe_steps() const { return min(a_end - a, b_end - b); }
  void step() {
    const uint64_t key_a = *a, key_b = *b;
    const bool of_a = key_a <= key_b, of_b = key_b <= key_a;
    take(kRepeats ? min(key_a, key_b) : 0, of_a * kOfFirst | of_b * kOfSecond);
    a += of_a;
    b += of_b;
  }
  void finish() {
    for (int64_t n; (n = safe_steps()) > 0;)
      for (int64_t k = 0; k < n; ++k) step();
    while (a < a_end) take(*a++, kOfFirst);
    while (b < b_end) take(*b++, kOfSecond);
  }

 private:
  void take(uint64_t key, int from) {
    *steps++ = static_cast<uint8_t>(from | (!kRepeats || key != before) * kFresh);
    if (kRepeats) before = key;
  }
};

// Two at once: a step waits for the one before it, but not for those of the other merge.
template <bool kRepeats>
void finish_both(Merge<kRepeats>& x, Merge<kRepeats>& y) {
  Merge<kRepeats> p = x, q = y;  // in registers
  for (int64_t n; (n = min(p.safe_steps(), q.safe_steps())) > 0;)
    for (int64_t k = 0; k < n; ++k) {
      p.step();
      q.step();
    }
  p.finish();
  q.finish();
  x = p;
  y = q;
}

}  // namespace cvc::voxels
