// Features of voxels out of a dense volume, compiled once per instruction set (common/isa.h).
//
// A channel's cells lie all over its volume, a few to a line of the cache and to a page of memory, so most of the time
// goes by waiting for lines, and what counts is how many are under way at a time. Voxels are read in blocks, all
// channels of one at once, and in between the lines of the next block are fetched into the second level, which waits
// for more of them than the first. A steady few: fetches that find no place to wait in are dropped. And never one place
// in several channels at a time: where these lie a power of two apart, as they do in most volumes, memory hands such
// lines out one after the other. So every channel is one line behind the one before, which makes it up to three times
// as fast.
#include "common/isa.h"
#include "common/simd.h"
#include "voxels/gather_cells.h"

namespace cvc::voxels {
namespace {

// Channels are read in groups: where a volume is a power of two long, all channels of a cell lie in the same set of the
// cache, which has eight ways. Blocks are as long as it takes a line to arrive.
constexpr int64_t kChannels = 8, kBlock = 128, kBlockOfFew = 512;

template <class T>
using Lanes = Vec<T, 16 / sizeof(T)>;

// Some voxels: where the first channel of each is, and the lines of the cache that these lie in.
template <class T>
struct Block {
  const T* place[kBlockOfFew];
  const T* ring[kChannels + kBlockOfFew + 8];  // as far as whole vectors are written
  int64_t count, lines;

  const T** line() { return ring + kChannels; }
  // The one `back` before line k, round about; 0 <= back < kChannels.
  const T* line(int64_t k, int64_t back) const { return ring[kChannels + k - back]; }
  // The last lines, once more in front of the first.
  void close_ring() {
    for (int64_t k = 1, at = lines; k < kChannels && lines > 0; ++k)
      line()[-k] = line()[at = (at > 0 ? at : lines) - 1];
  }
};

// Goes over voxels in order, block by block.
template <class T>
class Finder {
 public:
  Finder(const CellGather& gather, int64_t begin, int64_t end)
      : dense_(reinterpret_cast<uintptr_t>(gather.dense)),
        volume_(gather.volume),
        // From the cells of all volumes to the elements of one channel: those of the other channels lie between.
        between_(static_cast<uint64_t>(gather.volume.cells() * (gather.channels - 1))),
        coords_(gather.coords + kRow * begin),
        block_(gather.channels > 2 ? kBlock : kBlockOfFew),
        left_(end - begin),
        before_(begin > 0 ? volume_.cell(coords_ - kRow) : -1) {}

  // The next block. Empty behind the last voxel, and where one lies outside.
  void next(Block<T>& block) {
    const int64_t count = left_ < block_ ? left_ : block_;
    block.lines = 0;
    line_ = 0;  // none
    int64_t i = many(count, block);
    for (; i < count; ++i) {
      if (i % (16 / kRow) == 0) fetch_ahead(coords_ + kRow * i);  // once a line
      one(coords_ + kRow * i, block.place[i], block);
    }
    coords_ += kRow * count;
    left_ -= count;
    block.count = order.inside ? count : 0;
    block.lines = order.inside ? block.lines : 0;
    block.close_ring();
  }

  Order order;

 private:
  static constexpr int64_t kRow = 4;  // numbers

  void one(const int32_t* c, const T*& place, Block<T>& block) {
    const int64_t cell = volume_.cell(c);
    order.inside &= volume_.holds(c);
    order.ascending &= before_ < cell;
    before_ = cell;
    const uint64_t element = static_cast<uint64_t>(cell) + static_cast<uint32_t>(c[0]) * between_;
    const uintptr_t address = dense_ + element * sizeof(T);
    place = block.line()[block.lines] = reinterpret_cast<const T*>(address);
    block.lines += address / 64 != line_;  // else the next one takes its place
    line_ = address / 64;
  }

  // As many as are whole groups; returns where it stops.
#if defined(CVC_SIMD_AVX512)
  int64_t many(int64_t count, Block<T>& block) {
    constexpr int64_t kGroup = 8;
    const auto all = [](uint64_t value) { return _mm512_set1_epi64(static_cast<int64_t>(value)); };
    const uint32_t* const size = volume_.size;
    const __m512i sizes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(size)));
    const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14),
                  odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
    const __m512i y_size = all(size[2]), z_size = all(size[3]), volume = all(static_cast<uint64_t>(volume_.cells()));
    const __m512i between = all(between_), dense = all(dense_), field = all(~uint32_t{0});
    __m512i before = all(static_cast<uint64_t>(before_)), line = all(line_);
    unsigned inside = 0xFFFF, ascending = 0xFF;
    int64_t i = 0;
    for (; i + kGroup <= count; i += kGroup) {
      const __m512i low = _mm512_loadu_si512(coords_ + kRow * i), high = _mm512_loadu_si512(coords_ + kRow * i + 16);
      fetch_ahead(coords_ + kRow * i);
      fetch_ahead(coords_ + kRow * i + 16);
      inside &= _mm512_cmplt_epu32_mask(low, sizes) & _mm512_cmplt_epu32_mask(high, sizes);
      const __m512i bx = _mm512_permutex2var_epi64(low, even, high), yz = _mm512_permutex2var_epi64(low, odd, high);
      const __m512i batch = _mm512_and_si512(bx, field), x = _mm512_srli_epi64(bx, 32);
      // Of 16-bit coordinates: x·Y + y has 32 bits at most.
      const __m512i row = _mm512_add_epi64(_mm512_mul_epu32(x, y_size), _mm512_and_si512(yz, field));
      const __m512i own = _mm512_add_epi64(_mm512_mul_epu32(row, z_size), _mm512_srli_epi64(yz, 32));
      const __m512i cell = _mm512_add_epi64(own, _mm512_mullo_epi64(batch, volume));
      ascending &= _mm512_cmplt_epi64_mask(_mm512_alignr_epi64(cell, before, 7), cell);
      before = cell;
      const __m512i element = _mm512_add_epi64(cell, _mm512_mullo_epi64(batch, between));
      const __m512i address = _mm512_add_epi64(dense, _mm512_mullo_epi64(element, all(sizeof(T))));
      _mm512_storeu_si512(block.place + i, address);
      const __m512i own_line = _mm512_srli_epi64(address, 6);
      const __mmask8 begins = _mm512_cmpneq_epi64_mask(_mm512_alignr_epi64(own_line, line, 7), own_line);
      line = own_line;
      _mm512_storeu_si512(block.line() + block.lines, _mm512_maskz_compress_epi64(begins, address));
      block.lines += __builtin_popcount(begins);
    }
    order.inside &= inside == 0xFFFF;
    order.ascending &= ascending == 0xFF;
    before_ = reinterpret_cast<Vec<int64_t>>(before)[kGroup - 1];
    line_ = static_cast<uintptr_t>(reinterpret_cast<Vec<int64_t>>(line)[kGroup - 1]);
    return i;
  }
#else
  int64_t many(int64_t, Block<T>&) { return 0; }
#endif

  const uintptr_t dense_;
  const Volume volume_;
  const uint64_t between_;
  const int32_t* coords_;
  const int64_t block_;
  int64_t left_, before_;
  uintptr_t line_ = 0;
};

// One vector of values that lie `size` apart.
template <class T>
[[gnu::always_inline]] inline Lanes<T> collect(const T* cell, int64_t size) {
  if constexpr (sizeof(T) == 4) {  // by pairs: sooner done than by inserting one after the other
    const Lanes<T> a{cell[0]}, b{cell[size]}, c{cell[2 * size]}, d{cell[3 * size]};
    typedef Vec<uint64_t, 2> Pair;
    return (Lanes<T>)__builtin_shufflevector((Pair)__builtin_shufflevector(a, b, 0, 4, 1, 5),
                                             (Pair)__builtin_shufflevector(c, d, 0, 4, 1, 5), 0, 2);
  } else {
    Lanes<T> lanes;
    for (int l = 0; l < static_cast<int>(16 / sizeof(T)); ++l) lanes[l] = cell[l * size];
    return lanes;
  }
}

template <bool kPastCaches, class T>
[[gnu::always_inline]] inline void write(Lanes<T> lanes, T* to) {
#if defined(__SSE2__)
  if constexpr (kPastCaches) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)lanes);
    return;
  }
#endif
  store(to, lanes);
}

// Lines of a block to be fetched, those of some of the channels.
template <class T>
struct Ahead {
  const Block<T>& block;
  int64_t offset, channels;

  // As many as there are channels; after all k < block.lines, every line of every channel.
  [[gnu::always_inline]] void fetch(int64_t k, int64_t size) const {
    const auto one = [&](int64_t c) { __builtin_prefetch(block.line(k, c) + offset + c * size, 0, 2); };
    if (channels == kChannels) {  // unrolled
      for (int64_t c = 0; c < kChannels; ++c) one(c);
    } else {
      for (int64_t c = 0; c < channels; ++c) one(c);
    }
  }
};

// Some channels of a block, all that a group may have or fewer, while lines are fetched.
template <bool kAll, bool kPastCaches, class T>
void gather_group(const Block<T>& block, int64_t offset, int64_t channels, const Ahead<T>& ahead, int64_t size,
                  int64_t stride, T* to) {
  constexpr int64_t kStep = 4;
  const int64_t lines = ahead.block.lines, a_step = (lines * kStep + block.count - 1) / block.count;
  const auto row = [&](int64_t i) {
    const T* const cell = block.place[i] + offset;
    T* const out = to + i * stride;
    if constexpr (kAll) {
      constexpr int64_t kLanes = 16 / sizeof(T);
      for (int64_t c = 0; c < kChannels; c += kLanes) write<kPastCaches>(collect(cell + c * size, size), out + c);
    } else {
      for (int64_t c = 0; c < channels; ++c) out[c] = cell[c * size];
    }
  };
  int64_t i = 0, k = 0;
  for (; i + kStep <= block.count; i += kStep) {
    const int64_t last = k + a_step < lines ? k + a_step : lines;
    for (; k < last; ++k) ahead.fetch(k, size);
    for (int64_t j = 0; j < kStep; ++j) row(i + j);
  }
  for (; i < block.count; ++i) row(i);
  for (; k < lines; ++k) ahead.fetch(k, size);
}

// Parts of rows, each a line of the cache, past the caches.
template <class T>
void stream_parts(const T* parts, int64_t count, int64_t stride, T* to) {
  constexpr int64_t kLanes = 16 / sizeof(T), kPart = 64 / sizeof(T);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < kPart; c += kLanes) write<true>(load<Lanes<T>>(parts + i * kPart + c), to + i * stride + c);
}

template <class T>
Order gather_cells(const CellGather& gather, int64_t begin, int64_t end) {
  constexpr int64_t kPart = 64 / sizeof(T);
  const int64_t channels = gather.channels, size = gather.volume.cells();
  const auto at_most = [](int64_t n) { return n < kChannels ? n : kChannels; };
  const bool whole = gather.past_caches && channels == kChannels;
  const bool by_parts = gather.past_caches && !whole && channels % kPart == 0;
  alignas(64) T parts[kBlock * kPart];
  Finder<T> finder(gather, begin, end);
  Block<T> blocks[2];
  finder.next(blocks[0]);
  for (int64_t k = 0; k < blocks[0].lines; ++k) Ahead<T>{blocks[0], 0, at_most(channels)}.fetch(k, size);
  T* to = static_cast<T*>(gather.out) + begin * channels;
  for (int turn = 0; blocks[turn].count > 0; turn = 1 - turn) {
    const Block<T>& now = blocks[turn];
    finder.next(blocks[1 - turn]);
    for (int64_t c = 0; c < channels; c += kChannels) {
      const int64_t after = c + kChannels < channels ? c + kChannels : 0;  // the next block's first, after the last
      const Ahead<T> ahead{after ? now : blocks[1 - turn], after * size, at_most(channels - after)};
      if (at_most(channels - c) < kChannels) {
        gather_group<false, false>(now, c * size, channels - c, ahead, size, channels, to + c);
      } else if (whole) {
        gather_group<true, true>(now, c * size, kChannels, ahead, size, channels, to + c);
      } else if (by_parts) {
        gather_group<true, false>(now, c * size, kChannels, ahead, size, kPart, parts + c % kPart);
        if ((c + kChannels) % kPart == 0) stream_parts(parts, now.count, channels, to + c + kChannels - kPart);
      } else {
        gather_group<true, false>(now, c * size, kChannels, ahead, size, channels, to + c);
      }
    }
    to += now.count * channels;
  }
#if defined(__SSE2__)
  _mm_sfence();  // what was written past the caches is there for other threads
#endif
  return finder.order;
}

}  // namespace

Order CVC_ISA_NAME(gather_cells)(const CellGather& gather, int64_t begin, int64_t end) {
  switch (gather.width) {
    case 2: return gather_cells<uint16_t>(gather, begin, end);
    case 8: return gather_cells<uint64_t>(gather, begin, end);
    default: return gather_cells<uint32_t>(gather, begin, end);
  }
}

}  // namespace cvc::voxels
