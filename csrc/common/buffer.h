// Uninitialised memory whose first touch is cheap: large blocks ask for huge pages, because faulting fresh 4 KiB pages
// costs as much as the work of a memory-bound kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cvc {

constexpr size_t kHugePage = size_t{2} << 20;

// Advice only: where the system has no huge pages nothing changes.
inline void advise_huge_pages(void* p, size_t bytes) {
#if defined(__linux__)
  // Whole pages, not whole huge ones: neighbouring blocks share the huge pages that straddle them.
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes + kPage - 1) & ~(kPage - 1);
  if (bytes >= kHugePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

#if defined(__linux__)
// At least so many bytes, in whole huge pages; `bytes` becomes how many there are. Null when the system has none left.
// Some of what is given is kept for the next who takes (buffer.cpp).
void* take_pages(size_t& bytes);
void give_pages(void* p, size_t bytes);
#endif
// Gives the system what is kept; returns how many bytes that were.
size_t release_kept_pages();

// Whether new buffers are filled with ones (NaN, -1), so that a read before a write shows: for tests.
extern bool poison_buffers;

// A move-only array of trivial elements. Throws std::bad_alloc.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) : size_(n) {
    bytes_ = (sizeof(T) * static_cast<size_t>(n > 0 ? n : 1) + 63) / 64 * 64;
    if (is_mapped()) {
      map();
    } else {
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes_));
    }
    if (!data_) throw std::bad_alloc();
    if (poison_buffers) std::memset(static_cast<void*>(data_), 0xFF, bytes_);
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() { release(); }

  T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  // Large blocks bypass malloc, which knows nothing of huge pages.
#if defined(__linux__)
  bool is_mapped() const { return bytes_ >= kHugePage; }
  void map() { data_ = static_cast<T*>(take_pages(bytes_)); }
  void release() {
    if (data_ && is_mapped()) {
      give_pages(static_cast<void*>(data_), bytes_);
    } else {
      std::free(data_);
    }
  }
#else
  bool is_mapped() const { return false; }
  void map() {}
  void release() { std::free(data_); }
#endif

  T* data_ = nullptr;
  int64_t size_ = 0;
  size_t bytes_ = 0;
};

}  // namespace cvc
