"""The walk over reference views gives what `epipolar_attention` gives on maps made beforehand."""

import math

import pytest
import torch
from torch.autograd import grad

from cvctoolkit import _native
from cvctoolkit.ops import epipolar_attention, projected_epipolar_attention
from cvctoolkit.ops.epipolar import walk, walk_backward
from cvctoolkit.ops.epipolar.samples import attention_inputs, projected_inputs
from cvctoolkit.testing import leaves

needs_native = pytest.mark.skipif(_native.isa() is None, reason="needs the native library")


def inputs(dtype=torch.float64, **options):
    made = projected_inputs(torch.Generator().manual_seed(0), **options)
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in made.items()}


def all_at_once(query, features, weight, bias, depth, Ks, viewmats, *, query_weight=None, query_bias=None,
                out_weight=None, out_bias=None, attended_bias=None, channel_block=None, neighbor_index=None,
                **options):  # fmt: skip
    """The definition: every map, then the attention, then the projection."""
    views = features.shape[1]
    others = neighbor_index or [[j for j in range(views) if j != v] for v in range(views)]
    maps = torch.stack([torch.einsum("hnc,bncyx->bnhyx", weight, features[:, row]) for row in others], 1)
    if query_weight is not None:
        query = torch.einsum("oc,bvcyx->bvoyx", query_weight, query)
        query = query if query_bias is None else query + query_bias.view(-1, 1, 1)
    out, lse = epipolar_attention(
        query, maps, bias, depth, Ks, viewmats, **{**options, "return_lse": True}, neighbor_index=neighbor_index
    )
    if out_weight is None:
        return out, lse
    out = torch.einsum("oc,bvcyx->bvoyx", out_weight, out)
    out = out if out_bias is None else out + out_bias.view(-1, 1, 1)
    attended = ~lse[:, :, :1].isneginf()
    return out if attended_bias is None else out + attended * attended_bias.view(-1, 1, 1), lse


CASES = {
    "plain": dict(),
    "heads": dict(heads=2, channels=70, activation="gelu"),
    "projections": dict(projections=True, out_of_bounds="mask", activation="silu"),
    "neighbors": dict(views=4, neighbor_index=[[1, 2], [0, 0], [3, 1], [2, -1]], batch=2),
    "tall": dict(grid=(19, 3), maps=(21, 4), channels=5, num_samples=2, ortho=True, projections=True),
}


def _small_strips(monkeypatch, rows, bands):
    """Strips of a few rows, of maps that exist for a band each or whole, whatever that costs."""
    for module in (walk, walk_backward):
        monkeypatch.setattr(module, "STRIP_BYTES", 1)
    monkeypatch.setattr(walk, "TILE_ROWS", rows)
    monkeypatch.setattr(walk, "MOST_ROWS", math.inf if bands else 0)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case):
    assert_equals_the_definition(inputs(**CASES[case]), None, "reference")


@needs_native
@pytest.mark.parametrize(
    "case, block", [(c, b) for c in CASES for b in ((None, 40, 64) if c == "heads" else (None, 1, 2))]
)
def test_blocks_equal_the_definition(case, block):
    assert_equals_the_definition(inputs(**CASES[case]), block, "native")


@needs_native
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("bands", [False, True], ids=["whole maps", "bands"])
@pytest.mark.parametrize("case", CASES)
def test_strips_equal_the_definition(monkeypatch, case, bands, rows):
    _small_strips(monkeypatch, rows, bands)
    kwargs = inputs(**CASES[case])
    for block in (None, 40 if case == "heads" else 3):
        assert_equals_the_definition(kwargs, block, "native")


def assert_equals_the_definition(kwargs, block, backend):
    names = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    values = leaves(kwargs, names)
    expected = all_at_once(**kwargs, backend="reference")
    got = projected_epipolar_attention(**kwargs, channel_block=block, return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    above = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in expected]
    above[1] = above[1].masked_fill(expected[1].isneginf(), 0)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    for name, a, b in zip(names, grad(got, values, above), grad(expected, values, above)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("layout", ["channels first", "channels last", "columns first", "gaps"])
@pytest.mark.parametrize("projections", [False, True])
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_one_tensor_as_query_and_features(monkeypatch, backend, projections, layout):
    """Has the sum of both gradients, in its own order in memory where that has rows."""
    if backend == "native":
        _small_strips(monkeypatch, 2, True)
    kwargs = inputs(grid=(5, 4), maps=(5, 4), channels=6, num_samples=2, projections=projections)
    channels = kwargs["query_weight"].shape[1] if projections else 6
    x = torch.randn(1, 3, channels, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    kwargs["weight"] = torch.randn(6, 2, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if layout == "channels last":
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    elif layout == "columns first":
        x = x.mT.contiguous().mT
    elif layout == "gaps":
        x = torch.stack([x, x], -1)[..., 0]
    x = x.detach().requires_grad_()
    other = x.detach().clone().requires_grad_()
    for block in (None, 4):
        found = []
        for query, wanted in ((x, [x]), (other, [other, x])):
            out = projected_epipolar_attention(
                **{**kwargs, "query": query, "features": x}, channel_block=block, backend=backend
            )
            found.append((out, sum(grad(out.square().sum(), wanted))))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        if layout.startswith("channels"):
            assert found[0][1].stride() == x.stride()


@needs_native
def test_bands_hold_all_rows_that_are_read(monkeypatch):
    """Maps are NaN outside of the bands; and cameras on a ring need few rows of them."""
    _small_strips(monkeypatch, 8, True)
    plans, made = [], walk.stages
    monkeypatch.setattr(walk, "stages", lambda *args: plans.append(made(*args)) or plans[-1])
    kwargs = inputs(torch.float32, grid=(40, 8), maps=(40, 8), channels=4, num_samples=3, ortho=True)
    got = projected_epipolar_attention(**kwargs)
    monkeypatch.setattr(walk, "STRIP_BYTES", 1 << 30)
    torch.testing.assert_close(got, projected_epipolar_attention(**kwargs), rtol=1e-5, atol=1e-5)
    (banded, whole) = plans
    assert len(banded) == 5 and [s.strips for s in whole] == [[slice(0, 40)]] and whole[0].bands is None
    heights = [end - begin for stage in banded for begin, end in stage.bands.values()]
    assert 0 < max(heights) < 40
    # Void pixels read nothing, so a stage of them needs nothing.
    kwargs["depth"][:, :, 8:16] = math.inf
    monkeypatch.setattr(walk, "STRIP_BYTES", 1)
    projected_epipolar_attention(**kwargs)
    assert all(begin == end for begin, end in plans[-1][1].bands.values())


@needs_native
def test_the_working_memory_is_a_few_rows(monkeypatch):
    """Cameras on a ring: no map of a whole view is ever allocated."""
    monkeypatch.setattr(walk, "STRIP_BYTES", 1)
    held, made = [], walk.LiveMaps.__init__

    def counted(self, *args):
        made(self, *args)
        held.append(self.held.shape)

    monkeypatch.setattr(walk.LiveMaps, "__init__", counted)
    scene = _level_ring(views=6, size=64)
    g = torch.Generator().manual_seed(0)
    features, weight = torch.randn(1, 6, 4, 64, 64, generator=g), torch.randn(4, 5, 4, generator=g)
    projected_epipolar_attention(
        features, features, weight, None, **scene, scale=1, num_samples=3, radius=0.1, camera_model="ortho"
    )
    assert held[0][3] <= 18  # of 64 rows: 16 and one more on either side


def _level_ring(views, size):
    """Orthographic cameras around a sphere, all at the same height."""
    viewmats, Ks = torch.eye(4).repeat(1, views, 1, 1), torch.eye(3).repeat(1, views, 1, 1)
    for v in range(views):
        c, s = math.cos(v * math.tau / views), math.sin(v * math.tau / views)
        viewmats[0, v, :3] = torch.tensor([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 1.3]])
    Ks[..., :2, :2] *= size / 2
    Ks[..., :2, 2] = size / 2
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    sphere = (0.64 - line[:, None] ** 2 - line**2).clamp_min(0).sqrt()
    return dict(depth=(1.3 - sphere).expand(1, views, size, size), Ks=Ks, viewmats=viewmats, width=size, height=size)


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets_agree(isa):
    kwargs = inputs(torch.float32, channels=83, heads=2, grid=(9, 11), maps=(8, 9), num_samples=5, activation="gelu")
    with _native.restricted_isa(isa) as granted:
        if granted != isa:
            pytest.skip(f"this machine has no {isa}")
        out = projected_epipolar_attention(**kwargs)
    exact = projected_epipolar_attention(
        **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=2e-5)


@needs_native
@pytest.mark.parametrize("size", [1, 3])
def test_threads_do_not_change_a_bit(size):
    """Of the kernels: a BLAS may split its products by threads."""
    g = torch.Generator().manual_seed(0)
    kwargs = attention_inputs(g, batch=size, channels=150, grid=(13, 17), maps=(12, 16), num_samples=4, heads=2)
    kwargs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    names = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor)]
    values, threads, found = leaves(kwargs, names), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            out = epipolar_attention(**kwargs)
            found.append([out, *grad(out.square().sum(), values)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, a, b in zip(["out", *names], found[0], other):
            assert torch.equal(a, b), name


def test_wrong_arguments_are_named():
    kwargs = inputs()
    for change, message in (
        (dict(weight=kwargs["weight"][:, :1]), "weight must have shape"),
        (dict(query_bias=torch.zeros(3).double()), "query_bias belongs to query_weight"),
        (dict(channel_block=0), "channel_block"),
        (dict(scale=math.nan), "scale must be finite"),
        (dict(num_samples=0), "num_samples must be >= 1"),
        (dict(depth=kwargs["depth"][0]), "depth must have shape"),
        ({k: kwargs[k][:, :1] for k in ("query", "features", "depth", "Ks", "viewmats")}, "needs at least 2 views"),
        (dict(query=kwargs["query"][:, :1]), "query must hold"),
        (dict(out_weight=torch.zeros(4, 99).double()), "out_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            projected_epipolar_attention(**{**kwargs, **change})
