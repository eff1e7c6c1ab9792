"""Reciprocal matches and the CVC score: SciPy's tree as the oracle, invariants, bad input."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from cvctoolkit.ops import adjacent_pairs, cvc_score, reciprocal_matches
from cvctoolkit.ops.matching.op import matches_by_bvh
from tests.oracles import oracle

spatial = oracle("scipy.spatial")
BACKENDS = ["native", "reference"]

#: Random, on a coarse lattice (ties and duplicates), on a line, all in one place, huge and tiny.
KINDS = ["random", "lattice", "line", "one-place", "huge", "tiny", "clustered"]


def cloud(seed, count, kind, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 3, generator=g, dtype=torch.float64)
    if kind == "lattice":
        points = points.mul(2).round()
    elif kind == "line":
        points[:, 1:] = 0.5
    elif kind == "one-place":
        points[:] = 0.25
    elif kind == "huge":
        points *= 1e15
    elif kind == "tiny":
        points *= 1e-15
    elif kind == "clustered":
        points = points * 1e-3 + torch.randint(0, 3, (count, 3), generator=g)
    return points.to(dtype)


clouds = st.tuples(st.integers(0, 2**16), st.integers(0, 90), st.integers(0, 90), st.sampled_from(KINDS))


def brute_force(a, b):
    """Every pair, in NumPy: who is whose nearest, the lowest index among equals."""
    if not len(a) or not len(b):
        return []
    d = a.double().numpy()[:, None] - b.double().numpy()[None]
    squared = (d[..., 0] ** 2 + d[..., 1] ** 2) + d[..., 2] ** 2
    forth, back = squared.argmin(1), squared.argmin(0)
    return [(i, int(j)) for i, j in enumerate(forth) if back[j] == i]


def pairs(matches):
    return list(zip(matches.index_a.tolist(), matches.index_b.tolist()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(clouds)
def test_matches_are_those_of_brute_force(backend, dtype, case):
    seed, n, m, kind = case
    a, b = cloud(seed, n, kind, dtype), cloud(seed + 1, m, kind, dtype)
    found = reciprocal_matches(a, b, backend=backend)
    assert pairs(found) == brute_force(a, b)
    torch.testing.assert_close(found.distance, (a[found.index_a] - b[found.index_b]).norm(dim=1))


@given(clouds)
def test_the_search_that_cuda_runs_finds_the_same(case):
    seed, n, m, kind = case
    a, b = cloud(seed, n, kind), cloud(seed + 1, m, kind)
    if kind in ("huge", "tiny"):
        return  # distances are compared after a square root there
    index_a, index_b = matches_by_bvh(a, b, float("inf"))
    assert list(zip(index_a.tolist(), index_b.tolist())) == brute_force(a, b)


@pytest.mark.parametrize("threads", [1, 2])
def test_matches_are_those_of_scipy_at_scale(threads):
    g = torch.Generator().manual_seed(0)
    a = torch.rand(20_000, 3, generator=g)
    b = a[torch.randperm(len(a), generator=g)[:15_000]] + 0.004 * torch.randn(15_000, 3, generator=g)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = reciprocal_matches(a, b, backend="native")
    finally:
        torch.set_num_threads(before)
    forth = spatial.cKDTree(b.double().numpy()).query(a.double().numpy())[1]
    back = spatial.cKDTree(a.double().numpy()).query(b.double().numpy())[1]
    mutual = np.flatnonzero(back[forth] == np.arange(len(a)))
    np.testing.assert_array_equal(found.index_a, mutual)
    np.testing.assert_array_equal(found.index_b, forth[mutual])


@given(clouds, st.sampled_from(BACKENDS))
def test_matching_is_symmetric_and_of_a_set_with_itself_the_identity(case, backend):
    seed, n, m, kind = case
    a, b = cloud(seed, n, kind), cloud(seed + 1, m, kind)
    forth, back = reciprocal_matches(a, b, backend=backend), reciprocal_matches(b, a, backend=backend)
    assert sorted(pairs(forth)) == sorted((i, j) for j, i in pairs(back))
    own = reciprocal_matches(a, a, backend=backend)
    distinct = torch.unique(a, dim=0).shape[0] if n else 0
    assert torch.equal(own.index_a, own.index_b) and len(own.index_a) == distinct


@given(clouds, st.sampled_from(BACKENDS), st.floats(0, 2))
def test_masks_and_distance_restrict(case, backend, limit):
    seed, n, m, kind = case
    a, b = cloud(seed, n, kind), cloud(seed + 1, m, kind)
    g = torch.Generator().manual_seed(seed)
    keep_a, keep_b = torch.rand(n, generator=g) < 0.6, torch.rand(m, generator=g) < 0.6
    found = reciprocal_matches(a, b, mask_a=keep_a, mask_b=keep_b, max_distance=limit, backend=backend)
    row_a, row_b = keep_a.nonzero()[:, 0], keep_b.nonzero()[:, 0]
    alone = [(int(row_a[i]), int(row_b[j])) for i, j in brute_force(a[keep_a], b[keep_b])]
    d = lambda i, j: ((a[i].double() - b[j].double()) ** 2).sum().item()  # noqa: E731
    expected = [(i, j) for i, j in alone if d(i, j) <= limit**2]
    assert pairs(found) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_that_are_not_finite_match_nothing(backend):
    a = torch.tensor([[0.0, 0, 0], [float("nan"), 0, 0], [float("inf"), 0, 0]])
    assert pairs(reciprocal_matches(a, a.clone(), backend=backend)) == [(0, 0)]
    assert pairs(reciprocal_matches(a[1:], a, backend=backend)) == []


def test_maps_are_counted_through_and_the_distance_has_a_gradient():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4, 5, 3, generator=g, requires_grad=True)
    b = torch.randn(6, 7, 3, generator=g)
    found = reciprocal_matches(a, b)
    flat = reciprocal_matches(a.detach().reshape(-1, 3), b.reshape(-1, 3))
    assert torch.equal(found.index_a, flat.index_a) and torch.equal(found.index_b, flat.index_b)
    (grad,) = torch.autograd.grad(found.distance.sum(), a)
    assert grad.reshape(-1, 3)[found.index_a].norm(dim=1).sub(1).abs().max() < 1e-5


# --- the score --------------------------------------------------------------------------------------------------------


def plain_score(points, confidences, top):
    """The definition, pair by pair."""
    scores = []
    for (a, b), (p, q) in zip(points.flatten(2, 3), confidences.flatten(2)):
        values = sorted(((p[i] * q[j]).sqrt().item() for i, j in brute_force(a, b)), reverse=True)[:top]
        scores.append(sum(values) / len(values))
    return sum(scores) / len(scores)


def views(seed=0, pairs=3, noise=0.05):
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(pairs, 1, 8, 9, 3, generator=g) + noise * torch.randn(pairs, 2, 8, 9, 3, generator=g)
    return points, 1 + 5 * torch.rand(pairs, 2, 8, 9, generator=g)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top", [5, 20])
def test_the_score_is_its_definition(top, backend):
    points, confidences = views()
    found = cvc_score(points, confidences, top=top, backend=backend)
    assert found.score.item() == pytest.approx(plain_score(points, confidences, top), rel=1e-5)
    assert found.matches.tolist() == [len(brute_force(*pair.flatten(1, 2))) for pair in points]


@given(st.integers(0, 1000), st.floats(0.5, 4))
def test_the_score_scales_with_confidence_and_ignores_rigid_motion(seed, factor):
    points, confidences = views(seed)
    score = cvc_score(points, confidences, top=10).score
    torch.testing.assert_close(cvc_score(points, factor * confidences, top=10).score, factor * score)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]
    moved = points.double() @ turn + 1
    torch.testing.assert_close(cvc_score(moved, confidences, top=10).score, score)


def test_the_options_for_what_the_paper_leaves_open():
    points, confidences = views(pairs=1)
    found = reciprocal_matches(points[0, 0], points[0, 1])
    p, q = confidences[0, 0].flatten()[found.index_a], confidences[0, 1].flatten()[found.index_b]
    for kind, values in (
        ("min", torch.minimum(p, q)), ("mean", (p + q) / 2), ("product", p * q), ("geometric", (p * q).sqrt()),
    ):  # fmt: skip
        got = cvc_score(points, confidences, top=7, match_confidence=kind).score
        torch.testing.assert_close(got, values.topk(7).values.mean())
    values = (p * q).sqrt()
    assert len(values) < 100
    torch.testing.assert_close(cvc_score(points, confidences).score, values.mean())
    torch.testing.assert_close(cvc_score(points, confidences, too_few="pad_with_zeros").score, values.sum() / 100)
    assert cvc_score(points, confidences, too_few="nan").score.isnan()
    confident = cvc_score(points, confidences, min_confidence=4.0)
    assert confident.score >= 4 and confident.matches < found.index_a.numel()


def test_consistent_views_score_higher_and_nothing_scores_zero():
    points, confidences = views(noise=0.0)
    good = cvc_score(points, confidences, top=50, too_few="pad_with_zeros").score
    bad = cvc_score(*views(noise=2.0), top=50, too_few="pad_with_zeros").score
    assert good > bad
    nowhere = torch.zeros(3, 2, 8, 9, dtype=torch.bool)
    assert cvc_score(points, confidences, mask=nowhere).per_pair.tolist() == [0, 0, 0]
    assert cvc_score(points[:0], confidences[:0]).score.isnan()
    broken = confidences.clone()
    broken[0, 0] = float("nan")
    assert cvc_score(points, broken).matches[0] == 0 and cvc_score(points, broken).score.isfinite()


def test_adjacent_pairs():
    assert adjacent_pairs(4).tolist() == [[0, 1], [1, 2], [2, 3], [3, 0]]
    assert adjacent_pairs(3, ring=False, symmetric=True).tolist() == [[0, 1], [1, 2], [1, 0], [2, 1]]
    assert adjacent_pairs(2).tolist() == [[0, 1]] and adjacent_pairs(1).tolist() == []


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(points_a=torch.zeros(4, 2)), "points_a must have shape"),
        (dict(points_a=torch.zeros(4, 3, dtype=torch.int64)), "points_a must have dtype"),
        (dict(points_b=torch.zeros(4, 3).double()), "points_b must have dtype float32"),
        (dict(mask_a=torch.ones(3, dtype=torch.bool)), "mask_a must have shape"),
        (dict(mask_b=torch.ones(4)), "mask_b must have dtype bool"),
        (dict(max_distance=-1.0), "max_distance must be >= 0"),
        (dict(max_distance=float("nan")), "max_distance must be finite"),
        (dict(backend="cuda"), "no backend"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match="reciprocal_matches: " + message):
        reciprocal_matches(**{"points_a": torch.zeros(4, 3), "points_b": torch.zeros(4, 3), **changes})


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(points=torch.zeros(2, 3, 4, 4, 3)), "points must have shape"),
        (dict(confidences=torch.zeros(2, 2, 4, 5)), "confidences must have shape"),
        (dict(top=0), "top must be >= 1"),
        (dict(match_confidence="max"), "match_confidence must be one of"),
        (dict(too_few="raise"), "too_few must be one of"),
        (dict(mask=torch.ones(2, 2, 4, 4)), "mask must have dtype bool"),
    ],
)
def test_bad_scores_are_named(changes, message):
    arguments = {"points": torch.zeros(2, 2, 4, 4, 3), "confidences": torch.ones(2, 2, 4, 4), **changes}
    with pytest.raises(ValueError, match="cvc_score: " + message):
        cvc_score(**arguments)


def test_wrong_types_are_type_errors():
    with pytest.raises(TypeError, match="reciprocal_matches: points_a must be a"):
        reciprocal_matches([[0.0] * 3], torch.zeros(1, 3))
