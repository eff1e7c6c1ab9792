// What the steps of a merge tell (voxels/steps.h) is written by kernels per instruction set; see isa_write_steps.cpp.
#pragma once

#include <cstdint>

namespace cvc::voxels {

// What a step takes: a row of the first list, of the second, of both when their keys are equal; and whether its key
// differs from that of the step before.
enum Step : uint8_t { kOfFirst = 1, kOfSecond = 2, kFresh = 4 };

// The keys of two sets of voxels in order, and the outputs of their merge. Rows of the second set count from `offset`
// on; counts and first are null when nobody asks for them.
struct Merged {
  const uint64_t *keys_a, *keys_b;
  int64_t *index_a, *index_b;
  int64_t offset;
  int32_t* coords;
  int64_t *counts, *first;
};

// Part of it: steps over rows [i, i_end) and [j, j_end) whose voxels come after the voxel `id`.
struct StepsPart {
  const uint8_t* step;
  int64_t i, i_end, j, j_end, id;
};

void write_steps_baseline(const Merged* merged, StepsPart part);
void write_steps_avx2(const Merged* merged, StepsPart part);
void write_steps_avx512(const Merged* merged, StepsPart part);

}  // namespace cvc::voxels
