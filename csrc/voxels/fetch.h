// Rows that are read soon, from anywhere.
#pragma once

#include <algorithm>
#include <cstddef>

namespace cvc::voxels {

// Fetches a row, as much of it as the processor does not fetch by itself, into the second level of the caches: it waits
// for more lines at a time than the first. Always inline: the compiler drops calls of functions that do nothing else.
[[gnu::always_inline]] inline void fetch_row(const void* row, size_t bytes) {
  constexpr size_t kLine = 64, kMost = 8 * kLine;
  const char* const first = static_cast<const char*>(row);
  __builtin_prefetch(first, 0, 2);
  for (size_t b = kLine; b < std::min(bytes, kMost); b += kLine) __builtin_prefetch(first + b, 0, 2);
}

}  // namespace cvc::voxels
