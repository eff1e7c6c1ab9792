"""Reciprocal matches between point maps, and the cross-view consistency score made of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks, _native
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, dynamic_sizes, names_itself
from cvctoolkit.ops.matching import reference
from cvctoolkit.ops.mesh import build_bvh, closest_point_on_mesh

_OP = "reciprocal_matches"
CONFIDENCES = ("min", "mean", "geometric", "product")
TOO_FEW = ("mean_of_found", "pad_with_zeros", "nan")
_BVH_KERNELS = ("build_bvh", "closest_point_on_mesh")


class Matches(NamedTuple):
    """Pairs of points that are each other's nearest neighbours.

    Attributes:
        index_a: ``[K]`` int64, ascending.
        index_b: ``[K]`` int64.
        distance: ``[K]``, of the two points, dtype of the points.
    """

    index_a: Tensor
    index_b: Tensor
    distance: Tensor


class CvcScore(NamedTuple):
    """Cross-view consistency.

    Attributes:
        score: ``[]``, the mean over the pairs.
        per_pair: ``[P]``.
        matches: ``[P]`` int64, the number of reciprocal matches of each pair.
    """

    score: Tensor
    per_pair: Tensor
    matches: Tensor


# --- operator ---------------------------------------------------------------------------------------------------------


def _nearest_by_bvh(queries: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """A point is a triangle whose corners coincide: the mesh kernels find it, exactly and with the same tie rule."""
    rows = torch.arange(len(points), dtype=torch.int32, device=points.device)
    faces = rows[:, None].expand(-1, 3).contiguous()
    found = closest_point_on_mesh(queries, points, faces, build_bvh(points, faces), backend="native")
    return found.distance, found.face_index


def matches_by_bvh(points_a: Tensor, points_b: Tensor, max_distance: float) -> tuple[Tensor, Tensor]:
    """The operator on CUDA: two searches of a bounding volume hierarchy, N log N where tiles would be N²."""
    row_a, row_b = (p.isfinite().all(-1).nonzero()[:, 0] for p in (points_a, points_b))
    a, b = points_a[row_a], points_b[row_b]
    if not len(a) or not len(b):
        return row_a[:0], row_b[:0]
    distance, partner = _nearest_by_bvh(a, b)
    _, back = _nearest_by_bvh(b, a)
    mutual = (back[partner] == torch.arange(len(a), device=a.device)) & (distance <= max_distance)
    return row_a[mutual], row_b[partner[mutual]]


def _native_matches(points_a: Tensor, points_b: Tensor, max_distance: float) -> tuple[Tensor, Tensor]:
    if points_a.device.type == "cpu":
        return _native.kernels.reciprocal_matches(points_a, points_b, max_distance)
    return matches_by_bvh(points_a, points_b, max_distance)


def _native_reasons(points_a: Tensor, points_b: Tensor, max_distance: float) -> Iterable[str]:
    if points_a.dtype not in _checks.FLOAT32_64:
        yield f"needs float32 or float64 points, got {points_a.dtype}"
    device = points_a.device.type
    for kernel in (_OP,) if device == "cpu" else _BVH_KERNELS:
        if not _native.has_kernel(kernel, device):
            yield f"no native {device} kernel for {kernel}"


def _fake(points_a: Tensor, points_b: Tensor, max_distance: float) -> tuple[Tensor, Tensor]:
    (count,) = dynamic_sizes(1)
    return points_a.new_empty(count, dtype=torch.int64), points_a.new_empty(count, dtype=torch.int64)


_reciprocal_matches = define_op(
    _OP,
    "(Tensor points_a, Tensor points_b, float max_distance) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.reciprocal_matches,
    native=Backend(_native_matches, _native_reasons),
)


# --- public functions -------------------------------------------------------------------------------------------------


def _invalid_as_nan(op: str, name: str, points: Tensor, mask: Tensor | None) -> Tensor:
    flat = points.reshape(-1, 3)
    if mask is None:
        return flat.contiguous()
    _checks.tensor(op, name, mask, "...", (torch.bool,), device=points.device)
    _checks.same_shape(op, name, mask, points.shape[:-1])
    return torch.where(mask.reshape(-1, 1), flat, torch.nan)


def reciprocal_matches(
    points_a: Tensor,
    points_b: Tensor,
    *,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    max_distance: float | None = None,
    backend: str | None = None,
) -> Matches:
    """Pairs of points of two sets in one frame that are each other's nearest neighbours, exactly.

    Args:
        points_a: ``[..., 3]`` float, e.g. ``[N, 3]`` or a point map ``[H, W, 3]``; rows are counted through. Points
            with NaN or infinity match nothing. Differentiable (``distance``).
        points_b: ``[..., 3]``, dtype and device of ``points_a``, any number of points. Differentiable.
        mask_a: bool, shape of ``points_a`` without its last dimension: the points that take part; None: all.
        mask_b: Likewise.
        max_distance: Keep pairs that are at most so far apart, in units of the points; None: all.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (index_a, index_b, distance), ascending in ``index_a``. Distances are compared in float64, equal ones go to the
        lower index, so the result is the same on every backend. Deterministic. The size depends on the data: on CUDA
        this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or ``backend`` do not fit, or ``max_distance`` is negative.

    Source: DUSt3R, ``find_reciprocal_matches``.
    """
    op = _OP
    _checks.tensor(op, "points_a", points_a, "... 3", _checks.FLOATING)
    _checks.tensor(op, "points_b", points_b, "... 3", (points_a.dtype,), device=points_a.device)
    limit = float("inf") if max_distance is None else _checks.number(op, "max_distance", max_distance, at_least=0)
    a = _invalid_as_nan(op, "mask_a", points_a, mask_a)
    b = _invalid_as_nan(op, "mask_b", points_b, mask_b)
    index_a, index_b = _reciprocal_matches(a.detach(), b.detach(), limit, backend=backend)
    return Matches(index_a, index_b, (a[index_a] - b[index_b]).norm(dim=-1))


def adjacent_pairs(num_views: int, *, ring: bool = True, symmetric: bool = False) -> Tensor:
    """The pairs of neighbouring views that a CVC score is averaged over.

    Args:
        num_views: V.
        ring: Also the last view with the first (cameras around an object), for three views or more.
        symmetric: Each pair in both orders (the predictor is not symmetric).

    Returns:
        ``[P, 2]`` int64.

    Raises:
        TypeError: Wrong argument types.
        ValueError: ``num_views`` is negative.
    """
    op = "adjacent_pairs"
    ring, symmetric = _checks.flag(op, "ring", ring), _checks.flag(op, "symmetric", symmetric)
    views = torch.arange(_checks.integer(op, "num_views", num_views, at_least=0))
    pairs = torch.stack([views[:-1], views[1:]], 1)
    if ring and num_views > 2:
        pairs = torch.cat([pairs, torch.tensor([[num_views - 1, 0]])])
    return torch.cat([pairs, pairs.flip(1)]) if symmetric else pairs


@names_itself
def cvc_score(
    points: Tensor,
    confidences: Tensor,
    *,
    top: int = 100,
    mask: Tensor | None = None,
    match_confidence: str = "geometric",
    too_few: str = "mean_of_found",
    max_distance: float | None = None,
    min_confidence: float = 0.0,
    backend: str | None = None,
) -> CvcScore:
    """Cross-view consistency: how confidently a stereo model finds the same surface in neighbouring views.

    For every pair the point maps of its two views, in one frame, are matched reciprocally; the score of the pair is the
    mean of its ``top`` highest match confidences, the score the mean over pairs. What the paper leaves open is an
    argument here; a ring or both orders of a pair is a matter of which pairs are given: see `adjacent_pairs`.

    Args:
        points: ``[P, 2, H, W, 3]`` float: per pair (i, j) the points of view i and those of view j, both in the frame
            of view i (DUSt3R's ``pts3d`` and ``pts3d_in_other_view``).
        confidences: ``[P, 2, H, W]`` float, of the points; DUSt3R's are ≥ 1 and unbounded. Differentiable.
        top: How many matches count.
        mask: ``[P, 2, H, W]`` bool, True on the object; None: every pixel. A background matches well and hides an
            inconsistent object.
        match_confidence: Of a match with confidences p and q: ``"min"``, ``"mean"``, ``"geometric"`` (√(p·q)) or
            ``"product"``.
        too_few: What a pair with fewer than ``top`` matches gets: ``"mean_of_found"`` (0 without any),
            ``"pad_with_zeros"`` (missing ones count as 0) or ``"nan"``.
        max_distance: See `reciprocal_matches`.
        min_confidence: Points below do not take part (DUSt3R's demo shows those above 3).
        backend: See `reciprocal_matches`.

    Returns:
        (score, per_pair, matches); the scores are float32 (float64 for float64 confidences), the score of no pairs is
        NaN. On CUDA this synchronises for every pair.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or an option do not fit.

    Source: AlignCVC (its CVC metric: the mean confidence of the top 100 matches between adjacent views).
    """
    op = "cvc_score"
    _checks.tensor(op, "points", points, "P 2 H W 3", _checks.FLOATING)
    _checks.tensor(op, "confidences", confidences, "P 2 H W", _checks.FLOATING, device=points.device)
    _checks.same_shape(op, "confidences", confidences, points.shape[:-1])
    top = _checks.integer(op, "top", top, at_least=1)
    _checks.choice(op, "match_confidence", match_confidence, CONFIDENCES)
    _checks.choice(op, "too_few", too_few, TOO_FEW)
    least = _checks.number(op, "min_confidence", min_confidence)
    valid = confidences >= least
    if mask is not None:
        _checks.tensor(op, "mask", mask, "P 2 H W", (torch.bool,), device=points.device)
        _checks.same_shape(op, "mask", mask, confidences.shape)
        valid = valid & mask
    valid = valid & confidences.isfinite()
    conf = confidences if confidences.dtype == torch.float64 else confidences.float()
    scores, counts = [conf.new_zeros(0)], [torch.zeros(0, dtype=torch.int64, device=points.device)]
    for pair in range(points.shape[0]):
        found = reciprocal_matches(
            points[pair, 0], points[pair, 1], mask_a=valid[pair, 0], mask_b=valid[pair, 1],
            max_distance=max_distance, backend=backend,
        )  # fmt: skip
        p, q = conf[pair, 0].flatten()[found.index_a], conf[pair, 1].flatten()[found.index_b]
        count = torch.ones_like(found.index_a).sum().reshape(1)
        scores.append(_mean_of_top(_of_match(p, q, match_confidence), count, top, too_few))
        counts.append(count)
    per_pair = torch.cat(scores)
    return CvcScore(per_pair.mean(), per_pair, torch.cat(counts))


def _of_match(p: Tensor, q: Tensor, kind: str) -> Tensor:
    if kind == "min":
        return torch.minimum(p, q)
    if kind == "mean":
        return (p + q) / 2
    return p * q if kind == "product" else (p * q).sqrt()


def _mean_of_top(values: Tensor, count: Tensor, top: int, too_few: str) -> Tensor:
    # Padded to a known size, so that nothing in Python depends on the number of matches.
    best = torch.cat([values, values.new_full((top,), -torch.inf)]).topk(top).values
    total = best.masked_fill(best.isinf(), 0).sum().reshape(1)
    if too_few == "pad_with_zeros":
        return total / top
    mean = total / count.clamp(1, top)
    return mean if too_few == "mean_of_found" else mean.masked_fill(count < top, torch.nan)
