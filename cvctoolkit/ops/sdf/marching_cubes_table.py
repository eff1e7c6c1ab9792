"""The 256 cube cases, derived in Python independently of csrc/sdf/marching_cubes_table.h, which they check.

Corner c = 4·dx + 2·dy + dz; bit c of a case is set when that corner is inside. Edges are numbered in lexicographic
order of (lower corner, axis).
"""

from __future__ import annotations

from functools import cache
from itertools import product

CORNERS = list(product((0, 1), repeat=3))
#: (lower corner, axis) of every cube edge.
EDGES = [(c, axis) for c in range(8) for axis in range(3) if CORNERS[c][axis] == 0]

# Which corners of its loop a case without an ambiguous face cuts off, in turn: the triangles of scikit-image (Lewiner
# et al., 2003); they follow no rule. Elsewhere loops become fans.
_EARS = (
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
    "1..10.21.1..12.0........01....0.....1..........."
)
EARS = [_EARS[3 * case : 3 * case + 3] for case in range(256)]


def _ends(edge: int) -> frozenset[int]:
    corner, axis = EDGES[edge]
    return frozenset((corner, corner + (4 >> axis)))


_EDGE_OF = {_ends(e): e for e in range(12)}


def _ring(axis: int, side: int) -> list[int]:
    """The corners of a cube face, clockwise seen from outside the cube."""
    u, v = (axis + 1) % 3, (axis + 2) % 3  # (u, v, axis) is right-handed: u to v turns counter-clockwise about +axis
    ring = []
    for a, b in ((0, 0), (0, 1), (1, 1), (1, 0)):
        corner = [0, 0, 0]
        corner[axis], corner[u], corner[v] = side, a, b
        ring.append(4 * corner[0] + 2 * corner[1] + corner[2])
    return ring if side == 1 else ring[::-1]


FACES = [_ring(axis, side) for axis in range(3) for side in (0, 1)]


def share_face(a: int, b: int) -> bool:
    """Whether two edges lie in a common face of the cube."""
    return any(_ends(a) | _ends(b) <= set(ring) for ring in FACES)


def segments(case: int, join: bool) -> dict[int, int]:
    """Where the surface leads from each crossed edge across one of its two faces.

    On a face the crossed edges alternate, clockwise, between leaving and entering the inside. From an edge where the
    inside is left the surface leads to the next one clockwise (around the outside corners, which joins the inside
    ones) or to the one before (around the inside corners, which separates them). They differ on ambiguous faces only.
    """
    leads: dict[int, int] = {}
    for ring in FACES:
        inside = [case >> c & 1 for c in ring]
        crossed = [k for k in range(4) if inside[k] != inside[(k + 1) % 4]]
        for n, k in enumerate(crossed):
            if inside[k]:
                other = crossed[(n + (1 if join else -1)) % len(crossed)]
                edge, end = (_EDGE_OF[frozenset((ring[j], ring[(j + 1) % 4]))] for j in (k, other))
                leads[edge] = end
    return leads


def loops(case: int, join: bool) -> list[list[int]]:
    """The closed polygons of a case, in order of their lowest edge, each beginning with it."""
    leads, found = segments(case, join), []
    while leads:
        edge = min(leads)
        loop = []
        while edge in leads:
            loop.append(edge)
            edge = leads.pop(edge)
        found.append(loop)
    return found


def ears(case: int, loop: list[int]) -> list[int]:
    """The edges at which a loop loses its corners, in turn, until a triangle remains."""
    if len(loop) > 3 and EARS[case] != "...":
        return [loop[int(corner)] for corner in EARS[case].rstrip(".")]
    for apex in range(len(loop)):
        fan = loop[apex:] + loop[:apex]
        if not any(share_face(fan[0], e) for e in fan[2:-1]):
            return fan[1:-2]
    raise AssertionError(f"case {case}: every fan has a cut in a face")


def triangles(case: int, join: bool) -> list[tuple[int, int, int]]:
    """Every loop cut into triangles: an ear between its two neighbours, again and again, and what remains."""
    out = []
    for loop in loops(case, join):
        for ear in ears(case, loop):
            at = loop.index(ear)
            out.append((loop[at - 1], ear, loop[(at + 1) % len(loop)]))
            loop.remove(ear)
        out.append((loop[2], loop[0], loop[1]))
    return out


@cache
def table(join: bool) -> list[list[tuple[int, int, int]]]:
    """The triangles of every case."""
    return [triangles(case, join) for case in range(256)]


@cache
def padded_table(join: bool) -> list[list[tuple[int, int, int]]]:
    """The same, every case filled up to five triangles by (-1, -1, -1)."""
    return [case + [(-1, -1, -1)] * (5 - len(case)) for case in table(join)]
