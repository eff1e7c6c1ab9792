// The device path: tree and queries as pipelines over an executor (common/exec.h). One thread searches for one query.
#pragma once

#include "common/exec.h"
#include "mesh/build.h"

namespace cvc::mesh {

// --- the tree
// ---------------------------------------------------------------------------------------------------------

constexpr int kCurveBits = 21;  // per axis

// Position along a 3-D Hilbert curve (Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707, 2004).
CVC_HD inline uint64_t hilbert_key(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t axis[3] = {x, y, z};
  for (uint32_t bit = 1u << (kCurveBits - 1); bit > 1; bit >>= 1) {
    for (int k = 0; k < 3; ++k) {
      if (axis[k] & bit) {
        axis[0] ^= bit - 1;
      } else {
        const uint32_t swap = (axis[0] ^ axis[k]) & (bit - 1);
        axis[0] ^= swap;
        axis[k] ^= swap;
      }
    }
  }
  axis[1] ^= axis[0];
  axis[2] ^= axis[1];
  uint32_t flip = 0;
  for (uint32_t bit = 1u << (kCurveBits - 1); bit > 1; bit >>= 1)
    if (axis[2] & bit) flip ^= bit - 1;
  uint64_t key = 0;
  for (int b = kCurveBits - 1; b >= 0; --b)
    for (int k = 0; k < 3; ++k) key = key << 1 | ((axis[k] ^ flip) >> b & 1);
  return key;
}

// Of a point in the tree's units; outside the mesh's cube it counts to the rim.
CVC_HD inline uint64_t hilbert_key(float x, float y, float z) {
  const auto cell = [](float v) {
    return static_cast<uint32_t>(min(max(0.0f, (v + 1) * 0.5f), 0x1.fffffep-1f) * (1 << kCurveBits));
  };
  return hilbert_key(cell(x), cell(y), cell(z));
}

// The order of `n` items by the leading bits of their keys, stable. `key` gives the key of an item.
template <class Exec, class Key>
const int32_t* order_by(Exec& exec, int64_t n, int bits_per_axis, Key key) {
  uint64_t* keys = exec.template alloc<uint64_t>(n);
  uint64_t* sorted_keys = exec.template alloc<uint64_t>(n);
  int32_t* items = exec.template alloc<int32_t>(n);
  int32_t* sorted = exec.template alloc<int32_t>(n);
  exec.for_each(n, [=] CVC_HD(int64_t i) {
    keys[i] = key(i);
    items[i] = static_cast<int32_t>(i);
  });
  exec.sort_pairs(keys, sorted_keys, items, sorted, n, 3 * (kCurveBits - bits_per_axis), 3 * kCurveBits + 1);
  return sorted;
}

struct FaceKey {
  Mesh mesh;
  const Header* header;

  CVC_HD uint64_t operator()(int64_t face) const {
    Vec3<float> corner[3];
    if (!load_face(mesh, face, header->scale, corner)) return uint64_t{1} << (3 * kCurveBits);  // last
    const Vec3<float> m = middle(corner);
    return hilbert_key(m.x, m.y, m.z);
  }
};

template <class Exec>
void build_bvh(Exec& exec, const Mesh& mesh, float* words) {
  Header* const header = reinterpret_cast<Header*>(words);
  write_header(exec, mesh, header);
  fill_tree(exec, mesh, order_by(exec, mesh.num_faces, kCurveBits, FaceKey{mesh, header}), header, words);
}

// --- queries
// ----------------------------------------------------------------------------------------------------------

struct Output {
  void* values;  // in the dtype of the vertices
  int64_t* faces;
  void* barycentrics;
  bool float64;

  CVC_HD void store(int64_t row, double value, int64_t face, const double barycentric[3]) const {
    faces[row] = face;
    if (float64) {
      static_cast<double*>(values)[row] = value;
      for (int k = 0; k < 3; ++k) static_cast<double*>(barycentrics)[3 * row + k] = barycentric[k];
    } else {
      static_cast<float*>(values)[row] = static_cast<float>(value);
      for (int k = 0; k < 3; ++k) static_cast<float*>(barycentrics)[3 * row + k] = static_cast<float>(barycentric[k]);
    }
  }
};

// Answers query i, at row order[i] (row i without an order), depth first, nearest child first.
template <class Kind>
struct Search {
  Mesh mesh;
  Layout layout;  // of the mesh's tree
  const float* words;
  const Header* expected;  // of this mesh: another mesh's tree answers NaN, since a device cannot raise
  typename Kind::Input input;
  const int32_t* order;
  Output output;

  CVC_HD void operator()(int64_t i) const {
    const int64_t row = order ? order[i] : i;
    const Header& header = *reinterpret_cast<const Header*>(words);
    State state{{}, {0, 0, 0}, Kind::kUnbounded};
    typename Kind::Exact exact;
    typename Kind::Query query{};  // filled unless the query is not searchable
    const bool searchable = Kind::prepare(input, row, header.scale, &exact, &query);
    if (!same_mesh(header, *expected) || !Kind::is_valid(exact)) {
      state.best.value = NAN;
    } else if (mesh.num_faces > 0 && searchable) {
      descend(exact, query, header.scale, &state);
    } else if (mesh.num_faces > 0 && Kind::kAlwaysAnswered) {
      Vec3<float> corner[3];
      if (load_face(mesh, 0, header.scale, corner)) offer(exact, query, header.scale, 0, &state);
    }
    output.store(row, state.best.value, state.best.face, state.barycentric);
  }

 private:
  struct State {
    Best best;
    double barycentric[3];
    float reach;
  };
  struct Entry {
    float entered;
    uint32_t node;  // level in the upper 4 bits: fewer than 2^31 faces make fewer than 2^28 leaves
  };

  CVC_HD void offer(const typename Kind::Exact& exact, const typename Kind::Query& query, double scale, int64_t face,
                    State* state) const {
    double barycentric[3];
    if (!state->best.offer(Kind::evaluate(mesh, exact, face, barycentric), face)) return;
    for (int k = 0; k < 3; ++k) state->barycentric[k] = barycentric[k];
    state->reach = reach_of(state->best.value, scale, query);
  }

  CVC_HD void descend(const typename Kind::Exact& exact, const typename Kind::Query& query, double scale,
                      State* state) const {
    Entry stack[kStackSize];
    int size = 0;
    stack[size++] = {0, static_cast<uint32_t>(layout.root_level) << 28};
    while (size > 0) {
      const Entry top = stack[--size];
      if (!Kind::within(top.entered, state->reach)) continue;
      const int level = static_cast<int>(top.node >> 28);
      const int64_t index = top.node & 0xFFFFFFF;
      if (level == 0) {
        const float* leaf = words + layout.offset[0] + index * kLeafWords;
        const int32_t* faces = reinterpret_cast<const int32_t*>(leaf + 9 * kWidth);
        for (int lane = 0; lane < kWidth; ++lane) {
          const int32_t face = faces[lane];
          if (face >= 0 && face < mesh.num_faces && face != state->best.face &&
              Kind::passes(query, leaf, lane, state->reach))
            offer(exact, query, scale, face, state);
        }
        continue;
      }
      const float* node = words + layout.offset[level] + index * kNodeWords;
      const int bottom = size;
      for (int child = 0; child < kWidth; ++child) {
        const float entered = Kind::enter(query, node, child);
        if (!Kind::within(entered, state->reach)) continue;
        int at = size++;
        for (; at > bottom && stack[at - 1].entered < entered; --at) stack[at] = stack[at - 1];
        stack[at] = {entered, static_cast<uint32_t>(level - 1) << 28 | static_cast<uint32_t>(index * kWidth + child)};
      }
    }
  }
};

struct PointKey {
  Nearest::Input input;
  const Header* header;

  CVC_HD uint64_t operator()(int64_t row) const {
    const Double3 p = header->scale * Mesh::vector(input.points, input.float64, row);
    return hilbert_key(static_cast<float>(p.x), static_cast<float>(p.y), static_cast<float>(p.z));
  }
};

template <class Exec>
const Header* header_of(Exec& exec, const Mesh& mesh) {
  Header* header = exec.template alloc<Header>(1);
  write_header(exec, mesh, header);
  return header;
}

// Points are answered in the order of a space-filling curve, so that neighbouring threads walk the same nodes.
template <class Exec>
void closest_points(Exec& exec, const Mesh& mesh, const float* words, const Nearest::Input& input, int64_t n,
                    const Output& output) {
  const Header* expected = header_of(exec, mesh);
  const bool sortable = n <= INT32_MAX;
  const int32_t* order = sortable ? order_by(exec, n, 10, PointKey{input, expected}) : nullptr;
  exec.for_each(n, Search<Nearest>{mesh, make_layout(mesh.num_faces), words, expected, input, order, output});
}

template <class Exec>
void first_hits(Exec& exec, const Mesh& mesh, const float* words, const FirstHit::Input& input, int64_t n,
                const Output& output) {
  exec.for_each(
      n, Search<FirstHit>{mesh, make_layout(mesh.num_faces), words, header_of(exec, mesh), input, nullptr, output});
}

}  // namespace cvc::mesh
