"""What tests of sets and orders of voxels share."""

from contextlib import contextmanager

import hypothesis.strategies as st
import numpy as np
import torch

from cvctoolkit.ops.voxels.conventions import MAX_BATCH, MAX_COORD

BACKENDS = ["native", "reference"]
ORDERS = [("lexicographic", None), ("morton", None), ("hilbert", None), ("block", 1), ("block", 3), ("block", 16384)]
LARGEST = (MAX_BATCH, MAX_COORD, MAX_COORD, MAX_COORD)


def tensor(rows):
    return torch.tensor(sorted(rows) if isinstance(rows, set) else rows, dtype=torch.int32).reshape(-1, 4)


def rows_of(coords):
    return [tuple(row) for row in coords.tolist()]


# Small grids collide often; the largest has the longest keys; a far corner shifts all of it; borders come up often.
small = st.tuples(st.integers(0, 2), *[st.integers(0, 3)] * 3)
borders = st.tuples(*[st.sampled_from([0, 1, limit // 2, limit - 2, limit - 1]) for limit in LARGEST])
anywhere = st.tuples(*[st.integers(0, limit - 1) for limit in LARGEST])
lists = st.one_of(*[st.lists(voxel, max_size=60) for voxel in (small, borders, anywhere)])
# Given as they are, in order, or as two sets in order one after the other: each takes its own path.
arranged = st.builds(
    lambda rows, how: {"as is": rows, "sorted": sorted(rows)}.get(how, sorted(rows[::2]) + sorted(rows[1::2])),
    lists,
    st.sampled_from(["as is", "sorted", "two runs"]),
)
sets = st.builds(lambda rows, ordered: sorted(set(rows)) if ordered else list(set(rows)), lists, st.booleans())


def big(kind, count, seed):
    """More rows than one bucket, chunk or digit holds, from the arrangements that steer the kernels."""
    rng = np.random.default_rng(seed)
    limits = {
        "one column": (1, 1, 1, MAX_COORD), "cube": (2, 64, 64, 64), "grid": (1, 512, 512, 512), "everywhere": LARGEST
    }.get(kind, (1, 300, 300, 300))  # fmt: skip
    coords = np.stack([rng.integers(0, limit, count) for limit in limits], 1)
    if kind == "outliers":  # the leading bits of all but a few are the same
        coords[:: count // 7] = rng.integers(0, LARGEST, (len(coords[:: count // 7]), 4))
    if kind == "far corner":
        coords = np.array(LARGEST) - 1 - coords
    if kind == "equal":
        coords[:] = coords[0]
    if kind in ("sorted", "cube"):
        coords = coords[np.lexsort(coords.T[::-1])]
    return torch.from_numpy(coords.astype(np.int32))


KINDS = ["one column", "cube", "grid", "everywhere", "outliers", "far corner", "equal", "sorted"]
GOOD = tensor([(0, 1, 2, 3), (1, 0, 0, 5), (0, 0, 9, 9)])
OUTSIDE = [(0, -1, 0, 0), (-1, 0, 0, 0), (MAX_BATCH, 0, 0, 0), (0, 0, MAX_COORD, 0), (0, 0, 0, 2**31 - 1)]


@contextmanager
def words_per_row(most):
    """How many words of bits the native sets may spend on a row: none makes them sort."""
    limit = torch.ops.cvctoolkit_native.voxel_words_per_row
    before = limit(most)
    try:
        yield
    finally:
        limit(before)
