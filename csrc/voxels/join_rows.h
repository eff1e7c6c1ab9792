// Sums and maxima of rows, many at a time; see isa_join.cpp. In every instruction set the same bits.
#pragma once

#include <cstdint>

namespace cvc::voxels {

struct JoinRows {
  const void* rows;  // [count, channels], float or double
  int64_t count, channels;
  const uint32_t* to;  // [count] which row of `sums` each is joined with, one after the other
  void* sums;
  bool is_double, is_max;
};

struct FinishRows {
  const void* sums;  // [count, channels], float or double
  int64_t count, channels;
  const uint32_t* divisors;  // [count], at least 1; null: none
  void* out;                 // [count, channels]
  bool is_double;
  bool large;  // the whole result is: no cache keeps it until it is read
};

struct RowKernels {
  void (*join)(const JoinRows&);
  void (*finish)(const FinishRows&);
};

RowKernels row_kernels_baseline();
RowKernels row_kernels_avx2();
RowKernels row_kernels_avx512();

}  // namespace cvc::voxels
