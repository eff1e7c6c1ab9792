#include "common/buffer.h"

#include <mutex>
#include <vector>

namespace cvc {

bool poison_buffers = false;

#if defined(__linux__)
namespace {

// Filling fresh pages takes three times as long as filling used ones, so a few blocks are kept. The system may take
// their pages back whenever it wants them.
constexpr size_t kKept = size_t{64} << 20;

struct Block {
  void* p;
  size_t bytes;
};

struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t bytes = 0;
};

Kept& kept() {
  static Kept* const kept = new Kept;  // never destroyed: buffers may outlive static objects
  return *kept;
}

}  // namespace

void* take_pages(size_t& bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  if (bytes <= kKept) {
    Kept& k = kept();
    const std::lock_guard<std::mutex> lock(k.mutex);
    size_t best = k.blocks.size();
    for (size_t i = 0; i < k.blocks.size(); ++i)
      if (k.blocks[i].bytes >= bytes && k.blocks[i].bytes <= 2 * bytes &&
          (best == k.blocks.size() || k.blocks[i].bytes < k.blocks[best].bytes))
        best = i;
    if (best < k.blocks.size()) {
      const Block block = k.blocks[best];
      k.blocks.erase(k.blocks.begin() + static_cast<std::ptrdiff_t>(best));
      k.bytes -= block.bytes;
      bytes = block.bytes;
      return block.p;
    }
  }
  // Begins at a huge page: what is mapped too much is given back at once.
  const size_t more = bytes + kHugePage;
  void* const p = mmap(nullptr, more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  char* const first = static_cast<char*>(p);
  char* const begin = first + (kHugePage - reinterpret_cast<uintptr_t>(p) % kHugePage) % kHugePage;
  if (begin > first) munmap(first, static_cast<size_t>(begin - first));
  munmap(begin + bytes, static_cast<size_t>(first + more - begin - bytes));
  advise_huge_pages(begin, bytes);
  return begin;
}

void give_pages(void* p, size_t bytes) {
  Kept& k = kept();
  {
    const std::lock_guard<std::mutex> lock(k.mutex);
    if (k.bytes + bytes <= kKept) {
      madvise(p, bytes, MADV_FREE);
      k.blocks.push_back({p, bytes});
      k.bytes += bytes;
      return;
    }
  }
  munmap(p, bytes);
}

size_t release_kept_pages() {
  Kept& k = kept();
  const std::lock_guard<std::mutex> lock(k.mutex);
  for (const Block& block : k.blocks) munmap(block.p, block.bytes);
  k.blocks.clear();
  return std::exchange(k.bytes, 0);
}
#else
size_t release_kept_pages() { return 0; }
#endif

}  // namespace cvc
