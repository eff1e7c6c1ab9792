"""Epipolar operators: oracles of others, invariants, formats and precision. Samples and gradients: the contract."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from cvctoolkit._library import OPERATORS, record_calls
from cvctoolkit.ops import epipolar_attention, epipolar_points, epipolar_sample
from cvctoolkit.ops.epipolar import reference
from cvctoolkit.ops.epipolar.samples import attention_inputs, sample_inputs
from cvctoolkit.testing import assert_close_with_boundary_band
from tests.epipolar_tools import assert_close, backends, generator

few = settings(max_examples=12)


def hidden(samples, bias, activation):
    """act(bias + Σ over the slots) of [..., P, N, C] samples."""
    pre = samples.sum(-2) + bias
    return pre if activation == "identity" else getattr(F, activation)(pre)


def in_sight(build, **options):
    """Inputs of view 0 all of whose samples fall well inside the other, wider views."""
    kwargs = build(generator(), queries=1, reference_index=[0], radius=0.1, **options)
    kwargs["Ks"][:, 1:, :2, :2] *= 0.5
    kwargs["depth"] = torch.full_like(kwargs["depth"], 2.5)
    names = ("depth", "Ks", "viewmats", "width", "height", "num_samples", "radius", "camera_model", "reference_index")
    uv = epipolar_points(**{k: kwargs[k] for k in names}).uv
    assert (uv > 5).all() and (uv < torch.tensor([75, 55])).all()
    return kwargs


# --- oracles ----------------------------------------------------------------------------------------------------------


def by_hand(kwargs):
    """Samples through torch.linalg.inv and F.grid_sample, pixel by pixel of the definition."""
    features, depth, Ks, viewmats = (kwargs[k] for k in ("features", "depth", "Ks", "viewmats"))
    (batch, views, channels, *_), (rows, columns) = features.shape, depth.shape[-2:]
    width, height, count = kwargs["width"], kwargs["height"], kwargs["num_samples"]
    ortho = kwargs["camera_model"] == "ortho"
    out = torch.zeros(batch, views, rows, columns, count, views - 1, channels, dtype=depth.dtype)
    v, u = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    pixel = torch.stack([u * width / columns, v * height / rows, torch.ones_like(u)], -1).double()
    deltas = kwargs["radius"] * (2 * torch.arange(count).double() + 1 - count) / count
    for b in range(batch):
        for i in range(views):
            c2w = torch.linalg.inv(viewmats[b, i])
            ray = pixel @ torch.linalg.inv(Ks[b, i]).mT
            z = depth[b, i, ..., None]
            if ortho:
                point, direction = torch.cat([ray[..., :2], z], -1), torch.tensor([0.0, 0.0, 1.0]).double()
            else:
                point, direction = ray * z, ray / ray.norm(dim=-1, keepdim=True)
            samples = point[..., None, :] + deltas[:, None] * direction[..., None, :]
            world = samples @ c2w[:3, :3].mT + c2w[:3, 3]
            for slot, j in enumerate(x for x in range(views) if x != i):
                camera = world @ viewmats[b, j, :3, :3].mT + viewmats[b, j, :3, 3]
                if ortho:
                    camera = torch.cat([camera[..., :2], torch.ones_like(camera[..., :1])], -1)
                image = camera @ Ks[b, j].mT
                uv = image[..., :2] / image[..., 2:]
                grid = uv / torch.tensor([width, height]) * 2 - 1
                grid = grid.masked_fill(camera[..., 2:] <= 0, 9)
                grid = grid.reshape(1, rows, columns * count, 2)
                got = F.grid_sample(features[b, j][None], grid, padding_mode="zeros", align_corners=False)
                out[b, i, ..., slot, :] = got[0].reshape(channels, rows, columns, count).permute(1, 2, 3, 0)
    return out


@pytest.mark.parametrize("ortho", [False, True])
@pytest.mark.parametrize("maps, radius", [((6, 9), 0.7), ((11, 4), 0.7), ((6, 9), 0.0)])
def test_samples_are_those_of_grid_sample(ortho, maps, radius):
    """With radius 0 those of the surface points themselves."""
    kwargs = sample_inputs(
        generator(), batch=2, views=3, grid=(5, 4), maps=maps, ortho=ortho, radius=radius, channels=3
    )
    expected = by_hand(kwargs)
    assert (expected != 0).double().mean() > 0.5
    for backend in backends(epipolar_sample, kwargs):
        assert_close(epipolar_sample(**kwargs, backend=backend), expected)


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "silu"])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_that_of_torch(activation, heads):
    kwargs = attention_inputs(
        generator(),
        batch=2,
        views=3,
        channels=5,
        heads=heads,
        grid=(4, 3),
        maps=(7, 5),
        activation=activation,
        radius=0.7,
    )
    query, maps = kwargs["query"], kwargs["maps"]
    # View j's features in slot n of view i's maps: sampling view by view with one slot each.
    samples = torch.stack(
        [
            torch.stack([slot_samples(kwargs, i, n, j) for n, j in enumerate(x for x in range(3) if x != i)], -2)
            for i in range(3)
        ],
        1,
    )
    h = hidden(samples, kwargs["bias"], activation)  # [B, Q, H, W, P, C]
    q = query.unflatten(2, (heads, 5)).permute(0, 1, 4, 5, 2, 3).unsqueeze(-2)
    key = h.unsqueeze(4).expand(*h.shape[:4], heads, *h.shape[4:])
    expected = F.scaled_dot_product_attention(q, key, key, scale=kwargs["scale"]).squeeze(-2)
    expected = expected.flatten(-2).permute(0, 1, 4, 2, 3)
    for backend in backends(epipolar_attention, kwargs):
        assert_close(epipolar_attention(**kwargs, backend=backend), expected)
    assert maps.shape[2] == 2


def slot_samples(kwargs, i, slot, j):
    """Samples of slot ``slot`` of view i's maps, which show view j."""
    rest = ("Ks", "viewmats", "width", "height", "num_samples", "radius", "camera_model")
    views = kwargs["Ks"].shape[1]
    features = torch.zeros(kwargs["maps"].shape[0], views, *kwargs["maps"].shape[3:], dtype=torch.float64)
    features[:, j] = kwargs["maps"][:, i, slot]
    return epipolar_sample(
        features, kwargs["depth"][:, i : i + 1], **{k: kwargs[k] for k in rest}, reference_index=[i],
        neighbor_index=[[j]] * views, backend="reference",
    )[:, 0, ..., 0, :]  # fmt: skip


@pytest.mark.parametrize("ortho", [False, True])
@pytest.mark.parametrize("depth_type", ["z", "ray"])
def test_samples_sit_where_epipolar_points_are(ortho, depth_type):
    kwargs = sample_inputs(generator(3), grid=(4, 6), maps=(60, 80), ortho=ortho, depth_type=depth_type)
    v, u = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(80) + 0.5, indexing="ij")
    kwargs["features"] = torch.stack([u, v]).double().expand(1, 3, 2, 60, 80)  # a map of its own coordinates
    points = epipolar_points(**{k: v for k, v in kwargs.items() if k != "features"})
    got = epipolar_sample(**kwargs)
    size = torch.tensor([80.0, 60.0])
    inner = ((points.uv > 0.5) & (points.uv < size - 0.5)).all(-1) & ((points.depth > 0) | ortho)
    assert inner.double().mean() > 0.4
    assert_close(got[inner], points.uv[inner], 1e-10)


def test_one_formula_of_gradients():
    """The reference's explicit gradients are those that autograd finds in its forward pass."""
    for activation, ortho, mask in ((1, False, False), (2, True, True), (3, False, True), (0, True, False)):
        options = dict(heads=2, ortho=ortho, out_of_bounds="mask" if mask else "zero", radius=1.2, maps=(3, 4))
        kwargs = attention_inputs(
            generator(1), activation=reference.ACTIVATIONS[activation], return_lse=True, **options
        )
        with record_calls() as calls:
            epipolar_attention(**kwargs)
        values = list(calls[0][1][:-1])
        tensors = [v.detach().requires_grad_() for v in values[:6]]
        for run in (OPERATORS["epipolar_attention"], reference.epipolar_attention):
            outputs = run(*tensors, *values[6:])
            weights = [torch.randn(o.shape, generator=generator(k), dtype=o.dtype) for k, o in enumerate(outputs)]
            finite = [torch.where(o.isfinite(), o, 0) for o in outputs]
            grads = torch.autograd.grad(finite, tensors, weights)
            expected = grads if run is OPERATORS["epipolar_attention"] else expected  # noqa: F821
        for a, b in zip(grads, expected, strict=True):
            assert_close(a, b, 1e-10)


# --- invariants -------------------------------------------------------------------------------------------------------


@few
@given(st.integers(0, 2**16), st.booleans(), st.sampled_from(["zero", "mask"]))
def test_a_rigid_motion_of_the_scene_changes_nothing(seed, ortho, mode):
    kwargs = attention_inputs(generator(seed), ortho=ortho, out_of_bounds=mode, radius=0.8)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator(seed + 1), dtype=torch.float64))
    motion = torch.eye(4, dtype=torch.float64)
    motion[:3, :3] = rotation * torch.linalg.det(rotation)
    motion[:3, 3] = torch.randn(3, generator=generator(seed + 2), dtype=torch.float64) * 3
    moved = {**kwargs, "viewmats": kwargs["viewmats"] @ motion}
    assert_close(epipolar_attention(**moved), epipolar_attention(**kwargs), 1e-9)


@few
@given(st.integers(0, 2**16), st.permutations([0, 1, 2]))
def test_neighbours_may_come_in_any_order(seed, order):
    table = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    kwargs = attention_inputs(generator(seed), views=4, neighbor_index=table, num_samples=2)
    other = {**kwargs, "maps": kwargs["maps"][:, :, order], "neighbor_index": table[:, order]}
    assert_close(epipolar_attention(**other), epipolar_attention(**kwargs))


@few
@given(st.integers(0, 2**16), st.permutations([0, 1, 2, 3]))
def test_views_may_come_in_any_order(seed, order):
    """Renaming the views, in the cameras, the maps and the index, renames the results."""
    kwargs = sample_inputs(generator(seed), views=4, neighbor_index=[[1, 2], [0, 3], [3, 0], [2, 1]])
    position = {v: k for k, v in enumerate(order)}
    renamed = {k: kwargs[k][:, order] for k in ("features", "depth", "Ks", "viewmats")}
    index = [[position[n] for n in kwargs["neighbor_index"][v]] for v in order]
    got = epipolar_sample(**{**kwargs, **renamed, "neighbor_index": index})
    assert_close(got, epipolar_sample(**kwargs)[:, order])


@few
@given(st.integers(0, 2**16), st.integers(1, 6), st.sampled_from(["relu", "silu"]))
def test_identical_samples_return_the_sample(seed, count, activation):
    """Wide constant maps: whatever the scores, the average of equal things is that thing."""
    kwargs = in_sight(attention_inputs, num_samples=count, activation=activation)
    kwargs["query"] = torch.randn(1, 1, 3, 2, 3, generator=generator(seed), dtype=torch.float64)
    value = torch.randn(1, 1, 2, 3, 1, 1, generator=generator(seed + 1), dtype=torch.float64)
    kwargs["maps"] = value.expand(1, 1, 2, 3, 30, 40)
    pre = value[..., 0, 0].sum(2) + kwargs["bias"]
    assert_close(epipolar_attention(**kwargs), getattr(F, activation)(pre)[..., None, None].expand(1, 1, 3, 2, 3))


@few
@given(st.integers(0, 2**16), st.integers(-3, 3), st.integers(-3, 3), st.booleans())
def test_an_integer_shift_of_map_and_principal_point_changes_nothing(seed, dx, dy, ortho):
    kwargs = sample_inputs(generator(seed), maps=(60, 80), ortho=ortho, views=2, radius=0.8)
    inner = torch.zeros_like(kwargs["features"])
    inner[..., 6:-6, 6:-6] = kwargs["features"][..., 6:-6, 6:-6]
    kwargs["features"] = inner
    moved = torch.roll(inner, (dy, dx), (-2, -1))
    Ks = kwargs["Ks"].clone()
    Ks[:, 1, 0, 2] += dx
    Ks[:, 1, 1, 2] += dy
    options = dict(reference_index=[0], neighbor_index=[[1], [1]])
    kwargs["depth"] = kwargs["depth"][:, :1]
    expected = epipolar_sample(**kwargs, **options)
    assert_close(epipolar_sample(**{**kwargs, "features": moved, "Ks": Ks}, **options), expected, 1e-9)


@few
@given(st.integers(0, 2**16), st.integers(1, 5), st.booleans())
def test_without_radius_all_samples_are_the_point(seed, count, ortho):
    kwargs = attention_inputs(generator(seed), ortho=ortho, num_samples=count, radius=0.0)
    one = epipolar_attention(**{**kwargs, "num_samples": 1, "radius": 0.0})
    assert_close(epipolar_attention(**kwargs), one)
    rest = {k: v for k, v in sample_inputs(generator(seed), ortho=ortho, num_samples=count, radius=0.0).items()}
    samples = epipolar_sample(**rest)
    assert_close(samples, samples[..., :1, :, :].expand_as(samples))


@few
@given(st.integers(0, 2**16))
def test_the_middle_of_a_stratum_is_jitter_one_half(seed):
    kwargs = attention_inputs(generator(seed))
    half = torch.full((1, 3, 2, 3, 3), 0.5, dtype=torch.float64)
    assert_close(epipolar_attention(**kwargs, jitter=half), epipolar_attention(**kwargs))
    for shape in ((3,), (2, 3, 1), (1, 3, 1, 1, 1)):
        jitter = torch.rand(shape, generator=generator(seed), dtype=torch.float64)
        wide = jitter.expand(1, 3, 2, 3, 3)
        assert_close(
            epipolar_attention(**kwargs, jitter=jitter), epipolar_attention(**kwargs, jitter=wide.contiguous())
        )


def test_a_full_line_is_a_piece_around_its_middle():
    kwargs = attention_inputs(generator(), ortho=True, num_samples=4, radius=0.75)
    kwargs["depth"] = torch.full_like(kwargs["depth"], 1.25)
    line = {**kwargs, "depth": None, "radius": None, "near": 0.5, "far": 2.0}
    assert_close(epipolar_attention(**line), epipolar_attention(**kwargs))
    # Pinhole: planes of equal depth, sampled one by one; along the ray, spheres.
    rest = sample_inputs(generator(), near=1.0, far=3.0, num_samples=4, maps=(4, 5))
    for depth_type in ("z", "ray"):
        samples = epipolar_sample(**rest, depth_type=depth_type)
        for k, depth in enumerate((1.25, 1.75, 2.25, 2.75)):
            plane = {n: v for n, v in rest.items() if n not in ("near", "far")}
            plane |= dict(depth=torch.full((1, 3, 4, 5), depth).double(), radius=0.0, num_samples=1)
            assert_close(samples[..., k, :, :], epipolar_sample(**plane, depth_type=depth_type)[..., 0, :, :])


def test_heads_share_samples_and_nothing_else():
    kwargs = attention_inputs(generator(), heads=3, channels=4)
    together = epipolar_attention(**kwargs).unflatten(2, (3, 4))
    for head in range(3):
        query = kwargs["query"].unflatten(2, (3, 4))[:, :, head]
        assert_close(together[:, :, head], epipolar_attention(**{**kwargs, "query": query, "num_heads": 1}))


def test_walking_over_the_reference_views_is_all_at_once():
    kwargs = attention_inputs(generator(), views=4, batch=2, channels=3)
    together = epipolar_attention(**kwargs)
    for view in range(4):
        own = {k: kwargs[k][:, view : view + 1] for k in ("query", "maps", "depth")}
        assert_close(epipolar_attention(**{**kwargs, **own}, reference_index=[view]), together[:, view : view + 1])
        index = torch.tensor([view], dtype=torch.int32)
        assert_close(epipolar_attention(**{**kwargs, **own}, reference_index=index), together[:, view : view + 1])


def test_lse_merges_with_other_keys():
    """Two softmaxes over half the strata each, merged by their log-sum-exp, are one over all."""
    kwargs = attention_inputs(generator(), num_samples=4, radius=0.4, return_lse=True, heads=2)
    whole = epipolar_attention(**kwargs)
    halves = []
    for k in (0, 2):
        # The strata of a half are [−r, 0] or [0, r]: two samples placed by hand with jitter beyond [0, 1).
        place = (torch.arange(2).double() + k + 0.5) * 0.5 - torch.arange(2)
        halves.append(epipolar_attention(**{**kwargs, "num_samples": 2}, jitter=place))
    lse = torch.stack([h.lse for h in halves])
    share = lse.softmax(0)
    assert_close(lse.logsumexp(0), whole.lse)
    merged = sum(s.unsqueeze(3) * h.out.unflatten(2, (2, 3)) for s, h in zip(share, halves))
    assert_close(merged.flatten(2, 3), whole.out)


def test_a_gradient_of_the_lse_alone():
    kwargs = attention_inputs(generator(), return_lse=True)
    query = kwargs["query"].requires_grad_()
    (grad,) = torch.autograd.grad(epipolar_attention(**kwargs).lse.sum(), query)
    assert_close(grad, kwargs["scale"] * epipolar_attention(**kwargs).out.detach())


# --- memory formats, sizes, precision ---------------------------------------------------------------------------------


def test_memory_formats_agree_and_channels_last_comes_back():
    kwargs = attention_inputs(generator(), channels=6)
    expected = epipolar_attention(**kwargs)
    last = dict(kwargs)
    last["query"] = kwargs["query"].permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    last["maps"] = kwargs["maps"].permute(0, 1, 2, 4, 5, 3).contiguous().permute(0, 1, 2, 5, 3, 4)
    got = epipolar_attention(**last)
    assert torch.equal(got, expected)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    with record_calls() as calls:
        epipolar_attention(**last)
    assert (
        calls[0][1][0].data_ptr() == last["query"].data_ptr() and calls[0][1][1].data_ptr() == last["maps"].data_ptr()
    )
    assert calls[0][1][0].is_contiguous() and calls[0][1][1].is_contiguous(), "no copy was made"


@pytest.mark.parametrize("function", [epipolar_attention, epipolar_sample])
def test_more_than_2_to_the_31_elements(function):
    """Maps of 2.5·10⁹ elements, all of them one number in memory: offsets and counts are 64-bit."""
    size = (50_000, 50_000)
    if function is epipolar_attention:
        kwargs = in_sight(attention_inputs, channels=1, activation="identity", views=2)
        kwargs["maps"] = torch.ones(1).double().expand(1, 1, 1, 1, *size)
        expected = (1 + kwargs["bias"]).expand(1, 1, 1, 2, 3)
    else:
        kwargs = in_sight(sample_inputs, channels=1, views=2)
        kwargs["features"] = torch.ones(1).double().expand(1, 2, 1, *size)
        expected = torch.ones(1, 1, 3, 2, 3, 1, 1).double()
    for backend in backends(function, kwargs):
        assert_close(function(**kwargs, backend=backend), expected)


def test_shapes_beyond_2_to_the_31_without_memory():
    meta = sample_inputs(generator(), views=2)
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in meta.items()}
    meta["features"] = torch.empty(1, 2, 512, 64, 64, device="meta")
    meta["depth"] = torch.empty(1, 2, 2048, 2048, device="meta")
    out = epipolar_sample(**meta)
    assert out.shape == (1, 2, 2048, 2048, 3, 1, 512) and out.numel() > 2**31 and out.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_what_it_stores_and_nothing_else(dtype):
    kwargs = attention_inputs(generator(), channels=8, heads=2, return_lse=True)
    rounded = {k: kwargs[k].to(dtype) for k in ("query", "maps")}
    single = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    got = epipolar_attention(**{**single, **rounded})
    exact = epipolar_attention(**{**kwargs, **{k: v.double() for k, v in rounded.items()}})
    assert got.out.dtype == dtype and got.lse.dtype == torch.float32
    assert_close(got.out.double(), exact.out.to(dtype).double(), float(exact.out.abs().max()) * torch.finfo(dtype).eps)
    assert_close(got.lse.double(), exact.lse, 1e-5)


def test_autocast_leaves_it_alone():
    kwargs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in attention_inputs(generator()).items()}
    kwargs["maps"].requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = epipolar_attention(**kwargs)
            results.append((out, *torch.autograd.grad(out.sum(), kwargs["maps"])))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_gradients_jump_at_cell_borders_and_nowhere_else():
    """float32 against float64: tight except where a sample lies on the border between two cells."""
    kwargs = sample_inputs(generator(5), views=2, grid=(48, 64), maps=(60, 80), num_samples=1, radius=0.1, channels=3)
    uv = epipolar_points(**{k: v for k, v in kwargs.items() if k != "features"}).uv
    distance = ((uv - 0.5) - (uv - 0.5).round()).abs().amin((-1, -2, -3))
    grads = []
    for dtype in (torch.float64, torch.float32):
        cast = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        depth = cast["depth"].requires_grad_()
        grads.append(torch.autograd.grad(epipolar_sample(**cast).square().sum(), depth)[0])
    scale = float(grads[0].abs().max())
    assert_close_with_boundary_band(
        grads[1], grads[0], distance, band=2e-5, atol=1e-4 * scale, max_fraction=1e-3, what="d/d depth"
    )


@pytest.mark.parametrize("shift", [0.0, 1.0, -1.0, 7.0, 8.0, -0.5, 7.5])
def test_on_a_cell_border_both_sides_agree(shift):
    """Orthographic, one pixel, a sample exactly on a pixel centre, at the border of the map, or past it."""
    K = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(1, 2, 3, 3).clone().double()
    K[:, 1, 0, 2] = 0.5 + shift
    features = torch.randn(1, 2, 2, 8, 8, generator=generator(), dtype=torch.float64)
    options = dict(width=8, height=8, num_samples=1, radius=0.0, camera_model="ortho", reference_index=[0])
    viewmats = torch.eye(4).expand(1, 2, 4, 4).double()
    here = epipolar_sample(features, torch.ones(1, 1, 1, 1).double(), K, viewmats, **options)[0, 0, 0, 0, 0, 0]
    for nudge in (-1e-9, 1e-9):
        K[:, 1, 0, 2] += nudge
        near = epipolar_sample(features, torch.ones(1, 1, 1, 1).double(), K, viewmats, **options)[0, 0, 0, 0, 0, 0]
        assert_close(near, here, 1e-7)
    row = features[0, 1, :, 3:5].mean(1)  # v = 4 lies between rows 3 and 4
    share = (1 - (shift - torch.arange(8).double()).abs()).clamp_min(0)
    assert_close(here, row @ share, 1e-7)
