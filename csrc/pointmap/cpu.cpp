#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/buffer.h"
#include "pointmap/quads.h"

namespace cvc::pointmap {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowsPerTask = 16;

// --- depth_edge_mask
// --------------------------------------------------------------------------------------------------

// One output row: extremes of the rows [i - r, i + r] first, then of the columns. Invalid depths carry sentinels that
// neither extreme can take.
template <class T>
void edge_row(const T* depth, int64_t height, int64_t width, int64_t i, int64_t radius, T rtol, T atol, T* high, T* low,
              bool* edge) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  T* const hi = high + radius;  // padded by the radius on both sides
  T* const lo = low + radius;
  for (int64_t j = -radius; j < width + radius; ++j) hi[j] = -inf, lo[j] = inf;
  for (int64_t k = max<int64_t>(i - radius, 0); k <= min(i + radius, height - 1); ++k) {
    const T* row = depth + k * width;
    for (int64_t j = 0; j < width; ++j) {
      const T d = row[j];
      const bool valid = std::abs(d) < inf;
      const T for_high = valid ? d : -inf, for_low = valid ? d : inf;
      hi[j] = hi[j] < for_high ? for_high : hi[j];
      lo[j] = for_low < lo[j] ? for_low : lo[j];
    }
  }
  const T* row = depth + i * width;
  if (radius == 1) {  // the usual window, as one vectorised pass
    for (int64_t j = 0; j < width; ++j) {
      const T top = max(max(hi[j - 1], hi[j]), hi[j + 1]), bottom = min(min(lo[j - 1], lo[j]), lo[j + 1]);
      const T jump = top - bottom, size = std::abs(row[j]);
      edge[j] = (size < inf) & ((jump > rtol * size) | (jump > atol));
    }
    return;
  }
  for (int64_t j = 0; j < width; ++j) {
    T top = -inf, bottom = inf;
    for (int64_t k = -radius; k <= radius; ++k) top = max(top, hi[j + k]), bottom = min(bottom, lo[j + k]);
    const T jump = top - bottom, size = std::abs(row[j]);
    edge[j] = (size < inf) & ((jump > rtol * size) | (jump > atol));
  }
}

template <class T>
void edge_mask(const Tensor& depth, double rtol, double atol, int64_t kernel_size, Tensor& edge) {
  const int64_t batch = depth.size(0), height = depth.size(1), width = depth.size(2), radius = kernel_size / 2;
  const T* in = static_cast<const T*>(depth.const_data_ptr());
  bool* out = static_cast<bool*>(edge.mutable_data_ptr());
  torch::stable::parallel_for(0, batch * height, kRowsPerTask, [&](int64_t begin, int64_t end) {
    std::vector<T> high(width + 2 * radius), low(width + 2 * radius);
    for (int64_t row = begin; row < end; ++row)
      edge_row<T>(in + row / height * height * width, height, width, row % height, radius, static_cast<T>(rtol),
                  static_cast<T>(atol), high.data(), low.data(), out + row * width);
  });
}

Tensor depth_edge_mask(Tensor depth, double rtol, double atol, int64_t kernel_size) {
  Tensor edge = torch::stable::new_empty(depth, depth.sizes(), ScalarType::Bool);
  if (depth.scalar_type() == ScalarType::Double) {
    edge_mask<double>(depth, rtol, atol, kernel_size, edge);
  } else {
    edge_mask<float>(depth, rtol, atol, kernel_size, edge);
  }
  return edge;
}

// --- faces and compaction
// -----------------------------------------------------------------------------------------------
//
// Masks come in runs, so rows are worked off run by run: within a run of full quads the vertex numbers of both pixel
// rows are consecutive, and faces, points and indices are written without looking at single pixels.

// First position from j on whose byte differs from `value`, at most `end`.
int64_t run_end(const uint8_t* bytes, int64_t j, int64_t end, uint8_t value) {
  const uint64_t pattern = 0x0101010101010101u * value;
  for (uint64_t word; j + 8 <= end; j += 8) {
    std::memcpy(&word, bytes + j, 8);
    if (word != pattern) break;
  }
  while (j < end && bytes[j] == value) ++j;
  return j;
}

// How many bytes are odd: sums of bytes would widen on the way.
int32_t count_ones(const uint8_t* bytes, int64_t n) {
  constexpr uint64_t kOnes = 0x0101010101010101u;
  int32_t count = 0;
  int64_t j = 0;
  for (uint64_t word; j + 8 <= n; j += 8) {
    std::memcpy(&word, bytes + j, 8);
    count += std::popcount(word & kOnes);
  }
  for (; j < n; ++j) count += bytes[j] & 1;
  return count;
}

// The codes of a row of n quads, 15 for a full one and else 0.
void full_quads(const uint8_t* top, const uint8_t* bottom, int64_t n, uint8_t* __restrict code) {
  for (int64_t j = 0; j < n; ++j) {
    const uint8_t full = top[j] & top[j + 1] & bottom[j] & bottom[j + 1];
    code[j] = full ? 15 : 0;
  }
}

// Quad codes and triangle counts of every row of quads. A map of H rows has H - 1 rows of quads; row H - 1 of each map
// stays empty, so that quad rows and pixel rows share one numbering over the batch.
struct Quads {
  Quads(const uint8_t* mask, int64_t batch, int64_t height, int64_t width, bool corner_triangles)
      : stride(width + 1), storage(batch * height * stride, 0), first_face(batch * height + 1, 0) {
    torch::stable::parallel_for(0, batch * height, kRowsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (row % height == height - 1) continue;
        uint8_t* const c = storage.data() + row * stride + 1;
        const uint8_t *top = mask + row * width, *bottom = top + width;
        int32_t triangles = 0;
        if (corner_triangles) {
          for (int64_t j = 0; j + 1 < width; ++j) {
            const int q = quad_code(top[j], top[j + 1], bottom[j], bottom[j + 1]);
            c[j] = static_cast<uint8_t>(quad_corners(q, true));
            triangles += quad_triangles(q, true);
          }
        } else {
          full_quads(top, bottom, width - 1, c);
          triangles = 2 * count_ones(c, width - 1);
        }
        first_face[row + 1] = triangles;
      }
    });
    for (int64_t row = 0; row < batch * height; ++row) first_face[row + 1] += first_face[row];
  }

  // Codes of a row of quads; the byte before the first is 0, so that quad -1 is empty.
  const uint8_t* codes(int64_t row) const { return storage.data() + row * stride + 1; }

  int64_t stride;
  std::vector<uint8_t> storage;     // [batch * height, width + 1]
  std::vector<int64_t> first_face;  // [batch * height + 1]
};

// Faces of `count` neighbouring full quads with upper left corner a and lower left corner b: every two quads repeat
// the same twelve numbers plus two.
template <class Index>
Index* write_full_quads(int64_t count, Winding winding, Index a, Index b, Index* out) {
  Index two[12];
  write_quad<Index>(15, false, winding, a, a + 1, b, b + 1, two);
  write_quad<Index>(15, false, winding, a + 1, a + 2, b + 1, b + 2, two + 6);
  for (; count >= 2; count -= 2, out += 12)
    for (int k = 0; k < 12; ++k) {
      out[k] = two[k];
      two[k] += 2;
    }
  if (count == 1)
    for (int k = 0; k < 6; ++k) *out++ = two[k];
  return out;
}

// All faces of a row of quads. `number(j)` and `number_below(j)` are the indices of pixel j in the rows above and below
// the quads; they are consecutive within a run of full quads.
template <class Index, class Above, class Below>
void write_row(const uint8_t* code, int64_t width, bool corner_triangles, Winding winding, Above number,
               Below number_below, Index* face) {
  for (int64_t j = 0; j + 1 < width;) {
    if (code[j] == 15) {
      const int64_t end = run_end(code, j, width - 1, 15);
      face = write_full_quads<Index>(end - j, winding, number(j), number_below(j), face);
      j = end;
    } else if (code[j] == 0) {
      j = run_end(code, j, width - 1, 0);
    } else {
      face += 3 * write_quad<Index>(code[j], corner_triangles, winding, number(j), number(j + 1), number_below(j),
                                    number_below(j + 1), face);
      ++j;
    }
  }
}

// Tensor faces[F, 3] of pixel indices (b·H + i)·W + j, in row-major order of their quads.
template <class Index>
Tensor faces_of_pixels(const Tensor& mask, bool paper, bool corner_triangles, ScalarType dtype) {
  const int64_t batch = mask.size(0), height = mask.size(1), width = mask.size(2);
  const Quads quads(static_cast<const uint8_t*>(mask.const_data_ptr()), batch, height, width, corner_triangles);
  const Winding winding = paper ? Winding::paper : Winding::consistent;
  Tensor faces = torch::stable::new_empty(mask, {quads.first_face.back(), 3}, dtype);
  Index* const out = static_cast<Index*>(faces.mutable_data_ptr());
  torch::stable::parallel_for(0, batch * height, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      write_row<Index>(
          quads.codes(row), width, corner_triangles, winding,
          [=](int64_t j) { return static_cast<Index>(row * width + j); },
          [=](int64_t j) { return static_cast<Index>((row + 1) * width + j); }, out + 3 * quads.first_face[row]);
  });
  return faces;
}

Tensor pointmap_faces(Tensor mask, bool paper, bool corner_triangles) {
  if (mask.numel() <= std::numeric_limits<int32_t>::max())
    return faces_of_pixels<int32_t>(mask, paper, corner_triangles, ScalarType::Int);
  return faces_of_pixels<int64_t>(mask, paper, corner_triangles, ScalarType::Long);
}

template <class T>
bool all_finite(const T* x, int64_t n) {
  // By their bits, integers compare in every instruction set: what is not finite is not below infinity.
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const Bits infinity = std::bit_cast<Bits>(std::numeric_limits<T>::infinity());
  Bits bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bad |= infinity - 1 - (bits & std::numeric_limits<Bits>::max());  // negative
  }
  return bad >= 0;
}

// A pixel is valid when the mask says so and its point is finite.
template <class T>
void valid_row(const T* xyz, const bool* mask, int64_t width, uint8_t* valid) {
  if (mask) {
    std::memcpy(valid, mask, width);
  } else {
    std::memset(valid, 1, width);
  }
  if (all_finite(xyz, 3 * width)) return;
  for (int64_t j = 0; j < width; ++j) {
    const T zero = xyz[3 * j] * T(0) + xyz[3 * j + 1] * T(0) + xyz[3 * j + 2] * T(0);  // NaN for NaN and ±inf
    valid[j] &= zero == T(0);
  }
}

// Writes 1 for every pixel of a row that a triangle touches, 0 elsewhere; returns how many. `above` and `here` are the
// codes of the quad rows over and under the pixel row.
int64_t used_pixels(const uint8_t* above, const uint8_t* here, int64_t width, uint8_t* used) {
  for (int64_t j = 0; j < width; ++j) used[j] = (here[j] | here[j - 1] >> 1 | above[j] >> 2 | above[j - 1] >> 3) & 1;
  return count_ones(used, width);
}

// Calls run(begin, end) for every run of used pixels.
template <class F>
void for_each_run(const uint8_t* used, int64_t width, F run) {
  for (int64_t j = run_end(used, 0, width, 0); j < width;) {
    const int64_t end = run_end(used, j, width, 1);
    run(j, end);
    j = run_end(used, end, width, 0);
  }
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> mesh(const Tensor& points, const std::optional<Tensor>& mask, bool paper,
                                        bool corner_triangles) {
  const int64_t batch = points.size(0), height = points.size(1), width = points.size(2), rows = batch * height;
  const T* const xyz = static_cast<const T*>(points.const_data_ptr());
  const bool* const given = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;

  std::vector<uint8_t> valid(rows * width);
  torch::stable::parallel_for(0, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      valid_row(xyz + 3 * row * width, given ? given + row * width : nullptr, width, valid.data() + row * width);
  });
  const Quads quads(valid.data(), batch, height, width, corner_triangles);

  std::vector<uint8_t>& used = valid;  // validity is in the quads now
  const std::vector<uint8_t> none(width + 1, 0);
  std::vector<int64_t> first_vertex(rows + 1, 0);
  torch::stable::parallel_for(0, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      first_vertex[row + 1] = used_pixels(row % height == 0 ? none.data() + 1 : quads.codes(row - 1), quads.codes(row),
                                          width, used.data() + row * width);
  });
  for (int64_t row = 0; row < rows; ++row) first_vertex[row + 1] += first_vertex[row];

  Tensor vertices = torch::stable::new_empty(points, {first_vertex.back(), 3}, points.scalar_type());
  Tensor faces = torch::stable::new_empty(points, {quads.first_face.back(), 3}, ScalarType::Int);
  Tensor pixel_index = torch::stable::new_empty(points, {first_vertex.back()}, ScalarType::Long);
  T* const vertex_out = static_cast<T*>(vertices.mutable_data_ptr());
  int32_t* const face_out = static_cast<int32_t*>(faces.mutable_data_ptr());
  int64_t* const pixel_out = static_cast<int64_t*>(pixel_index.mutable_data_ptr());
  advise_huge_pages(vertex_out, 3 * sizeof(T) * first_vertex.back());
  advise_huge_pages(face_out, 3 * sizeof(int32_t) * quads.first_face.back());
  advise_huge_pages(pixel_out, sizeof(int64_t) * first_vertex.back());
  const Winding winding = paper ? Winding::paper : Winding::consistent;

  torch::stable::parallel_for(0, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> here(width), below(width);  // vertex of every used pixel in two rows
    const auto number = [&](int64_t row, std::vector<int32_t>& vertex) {
      int64_t v = first_vertex[row];
      for_each_run(used.data() + row * width, width, [&](int64_t from, int64_t to) {
        for (int64_t j = from; j < to; ++j) vertex[j] = static_cast<int32_t>(v + (j - from));
        v += to - from;
      });
    };
    number(begin, here);
    for (int64_t row = begin; row < end; ++row) {
      int64_t v = first_vertex[row];
      for_each_run(used.data() + row * width, width, [&](int64_t from, int64_t to) {
        const int64_t count = to - from, pixel = row * width + from;
        std::memcpy(vertex_out + 3 * v, xyz + 3 * pixel, 3 * count * sizeof(T));
        for (int64_t k = 0; k < count; ++k) pixel_out[v + k] = pixel + k;
        v += count;
      });
      if (row + 1 == rows) break;
      number(row + 1, below);
      write_row<int32_t>(
          quads.codes(row), width, corner_triangles, winding, [&](int64_t j) { return here[j]; },
          [&](int64_t j) { return below[j]; }, face_out + 3 * quads.first_face[row]);
      here.swap(below);
    }
  });
  return {vertices, faces, pixel_index};
}

std::tuple<Tensor, Tensor, Tensor> pointmap_mesh(Tensor points, std::optional<Tensor> mask, bool paper,
                                                 bool corner_triangles) {
  if (points.scalar_type() == ScalarType::Double) return mesh<double>(points, mask, paper, corner_triangles);
  return mesh<float>(points, mask, paper, corner_triangles);
}

}  // namespace
}  // namespace cvc::pointmap

// The schemas of the family's kernels; _C_cuda adds implementations only. All tensors are contiguous with one batch
// dimension: Python sees to it.
STABLE_TORCH_LIBRARY_FRAGMENT(cvctoolkit_native, m) {
  m.def("depth_edge_mask(Tensor depth, float rtol, float atol, int kernel_size) -> Tensor");
  m.def("pointmap_faces(Tensor mask, bool paper, bool corner_triangles) -> Tensor");
  m.def("pointmap_mesh(Tensor points, Tensor? mask, bool paper, bool corner_triangles) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(cvctoolkit_native, CPU, m) {
  m.impl("depth_edge_mask", TORCH_BOX(&cvc::pointmap::depth_edge_mask));
  m.impl("pointmap_faces", TORCH_BOX(&cvc::pointmap::pointmap_faces));
  m.impl("pointmap_mesh", TORCH_BOX(&cvc::pointmap::pointmap_mesh));
}
