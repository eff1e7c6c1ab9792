// Vectors of 16 bytes, which every x86-64 has.
#pragma once

#include <cstdint>
#include <cstring>

namespace cvc::voxels {

template <class T>
struct Vector16 {
  static constexpr int64_t kLanes = 16 / sizeof(T);
  typedef T Lanes __attribute__((vector_size(16)));
  static Lanes load(const T* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
  }
  static void store(Lanes lanes, T* to) { std::memcpy(to, &lanes, sizeof lanes); }
};

}  // namespace cvc::voxels
