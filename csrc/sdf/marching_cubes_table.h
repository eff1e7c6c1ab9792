// The cube cases of marching cubes (Lorensen & Cline 1987), traced at compile time instead of pasted.
//
//   corner c = 4·dx + 2·dy + dz;  bit c of a case is set when that corner is inside
//   edge   e = the e-th of the twelve cube edges in lexicographic order of (lower corner, axis)
//
// On every face of the cube the surface runs in segments from edge to edge; the segments of the six faces close into
// loops; each loop is cut into triangles. Two choices make the mesh closed and 2-manifold for any input:
//
// 1. A segment depends on the four corners of its face alone, so both cubes of a face draw the same segments. On an
//    ambiguous face (two inside corners, diagonally opposite) either all inside corners are joined or all are
//    separated: one table for each rule.
// 2. No cut runs between two edges of one face: the neighbour behind that face could make the same cut, which would
//    then belong to four triangles. Every loop of the 256 cases has an apex whose fan avoids this.
//
// A loop of four corners or more is not flat, and its cuts move the surface by up to 0.3 cells. Where a case has no
// ambiguous face the cuts are those of Lewiner et al. (2003) in scikit-image, so that the two give the same triangles;
// they follow no rule, hence kEars. The other loops become fans.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace cvc::marching_cubes {

struct Edge {
  uint8_t corner;  // the lower end
  uint8_t axis;
};

struct CubeTable {
  Edge edge[12];
  uint16_t crossed[256];        // bit e: edge e has one end inside and one outside
  uint8_t triangle_count[256];  // at most 5
  uint8_t triangles[256][15];   // three edges each, counter-clockwise seen from outside
};

namespace detail {

constexpr int bit_of_axis(int axis) { return 4 >> axis; }

constexpr int edge_between(const CubeTable& table, int a, int b) {
  for (int e = 0; e < 12; ++e) {
    const int low = table.edge[e].corner, high = low | bit_of_axis(table.edge[e].axis);
    if ((low == a && high == b) || (low == b && high == a)) return e;
  }
  return -1;
}

// Whether two edges lie in a common face, that is, whether their four ends agree in some coordinate.
constexpr bool share_face(Edge p, Edge q) {
  for (int axis = 0; axis < 3; ++axis) {
    const int bit = bit_of_axis(axis);
    if (p.axis != axis && q.axis != axis && ((p.corner ^ q.corner) & bit) == 0) return true;
  }
  return false;
}

// next[e] = the edge where the segment that starts on edge e ends. Walking round a face clockwise, seen from outside
// the cube, a segment starts where the walk leaves the inside. To join the inside corners it ends where the walk next
// enters the inside, cutting off the outside corners between; to separate them it ends where the walk last entered.
constexpr void trace_segments(const CubeTable& table, bool join, int cube, int (&next)[12]) {
  for (int axis = 0; axis < 3; ++axis) {
    for (int side = 0; side < 2; ++side) {
      const int u = bit_of_axis((axis + (side ? 2 : 1)) % 3), v = bit_of_axis((axis + (side ? 1 : 2)) % 3);
      const int first = side ? bit_of_axis(axis) : 0;
      const int ring[4] = {first, first | u, first | u | v, first | v};
      const auto inside = [&](int k) { return (cube >> ring[k & 3] & 1) != 0; };
      for (int k = 0; k < 4; ++k) {
        if (!inside(k) || inside(k + 1)) continue;
        int end = k;
        do end += join ? 1 : 3;
        while (inside(end) || !inside(end + 1));
        next[edge_between(table, ring[k], ring[(k + 1) & 3])] = edge_between(table, ring[end & 3], ring[(end + 1) & 3]);
      }
    }
  }
}

// Which corners of its loop a case without an ambiguous face cuts off, in turn: three places for each case, sixteen
// cases to a line. A triangle remains. None of these cases has two loops of more than three corners.
constexpr char kEars[] =
    ".........1.....0.....02.......0..12.1..10.21.1.."
    "...1.....02....02....213.........021...021...21."
    "......1..21..........132......02.032......02112."
    "0..12.01.1.....021...12.......13221..........1.."
    "............0..01....132............02.23102121."
    "1..21....13221.0.....02.............13212....0.."
    "................................................"
    "02.23102112.13221....1.........................."
    "........................1.....10.13212.02110201."
    "................................................"
    "0.....12.132............01....0..10.132...10.1.."
    "10.02110201.............132...02.0.............."
    "1...........10.132......12....021...1..02.12.0.."
    "12.021......01301.......132.........10.1........"
    "10....021...021.........120...01....01....1....."
    "1..10.21.1..12.0........01....0.....1...........";

// Whether the fan from loop[apex] has no diagonal in a face of the cube.
constexpr bool fan_is_interior(const CubeTable& table, const int* loop, int size, int apex) {
  for (int k = 2; k + 1 < size; ++k)
    if (share_face(table.edge[loop[apex]], table.edge[loop[(apex + k) % size]])) return false;
  return true;
}

// The edges at which a loop loses its corners until a triangle remains: those that kEars names, or else all but the two
// neighbours of an apex, the first along the loop that will do.
constexpr void choose_ears(const CubeTable& table, int cube, const int* loop, int size, int (&ears)[5]) {
  const bool named = size > 3 && kEars[3 * cube] != '.';
  int apex = 0;
  while (!named && !fan_is_interior(table, loop, size, apex)) ++apex;  // at compile time a miss would be an error
  for (int k = 0; k + 3 < size; ++k) ears[k] = loop[named ? kEars[3 * cube + k] - '0' : (apex + k + 1) % size];
}

constexpr CubeTable make_cube_table(bool join) {
  CubeTable table{};
  for (int corner = 0, e = 0; corner < 8; ++corner)
    for (int axis = 0; axis < 3; ++axis)
      if ((corner & bit_of_axis(axis)) == 0)
        table.edge[e++] = {static_cast<uint8_t>(corner), static_cast<uint8_t>(axis)};

  for (int cube = 0; cube < 256; ++cube) {
    int next[12];
    for (int& e : next) e = -1;
    trace_segments(table, join, cube, next);
    for (int e = 0; e < 12; ++e)
      if (next[e] >= 0) table.crossed[cube] |= static_cast<uint16_t>(1 << e);

    // Loops in order of their lowest edge, from which their corners are counted.
    int count = 0;
    for (int start = 0; start < 12; ++start) {
      if (next[start] < 0) continue;
      int loop[12] = {}, size = 0;
      for (int e = start; next[e] >= 0;) {
        const int following = next[e];
        loop[size++] = e;
        next[e] = -1;
        e = following;
      }
      int ears[5] = {};
      choose_ears(table, cube, loop, size, ears);
      for (const int* ear = ears; size >= 3; ++ear, ++count) {
        int at = 0;
        while (size > 3 && loop[at] != *ear) ++at;
        for (int k = 0; k < 3; ++k)
          table.triangles[cube][3 * count + k] = static_cast<uint8_t>(loop[(at + k + size - 1) % size]);
        --size;
        for (int k = at; k < size; ++k) loop[k] = loop[k + 1];
      }
    }
    table.triangle_count[cube] = static_cast<uint8_t>(count);
  }
  return table;
}

}  // namespace detail

inline constexpr CubeTable kCubeTables[2] = {detail::make_cube_table(false), detail::make_cube_table(true)};
#ifdef __CUDACC__
__device__ constexpr CubeTable kDeviceCubeTables[2] = {detail::make_cube_table(false), detail::make_cube_table(true)};
#endif

CVC_HD inline const CubeTable& cube_table(bool join) {
#ifdef __CUDA_ARCH__
  return kDeviceCubeTables[join];
#else
  return kCubeTables[join];
#endif
}

}  // namespace cvc::marching_cubes
