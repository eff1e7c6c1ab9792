"""The narrow band: bad input, on the CPU and in the device pipeline run on the host."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from cvctoolkit.ops import narrow_band_udf
from cvctoolkit.ops.mesh.samples import soup
from cvctoolkit.ops.sdf.narrow_band_samples import assert_same_band
from tests.bands import BACKENDS, TRIANGLE, any_width, brute_force, generator, soups
from tests.native import native_module

# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,error,message",
    [
        (dict(vertices=np.eye(3)), TypeError, "vertices must be a torch.Tensor"),
        (dict(vertices=torch.eye(4)), ValueError, r"vertices must have shape \[Nv, 3\]"),
        (dict(vertices=torch.eye(3).half()), ValueError, "vertices must have dtype"),
        (dict(vertices=torch.eye(3).int()), ValueError, "vertices must have dtype"),
        (dict(vertices=torch.eye(3) * float("nan")), ValueError, "vertices must be finite"),
        (dict(vertices=torch.eye(3) / 0), ValueError, "vertices must be finite"),
        (dict(vertices=torch.eye(3) * 1e30), ValueError, "vertices must be within"),
        (dict(faces=torch.tensor([[0, 1, 3]])), ValueError, "faces must index vertices 0 to 2, got 3"),
        (dict(faces=torch.tensor([[0, -1, 2]])), ValueError, "faces must index vertices 0 to 2, got -1"),
        (dict(faces=torch.tensor([[0, 1, 2]]).float()), ValueError, "faces must have dtype"),
        (dict(faces=torch.tensor([0, 1, 2])), ValueError, "faces must have shape"),
        (dict(faces=torch.zeros(1, 3).int().to("meta")), ValueError, "faces must be on cpu"),
        (dict(resolution=0), ValueError, "resolution must be >= 1"),
        (dict(resolution=65537), ValueError, "resolution must be <= 65536"),
        (dict(resolution=8.0), TypeError, "resolution must be an integer"),
        (dict(band=0), ValueError, "band must be > 0"),
        (dict(band=-1.0), ValueError, "band must be > 0"),
        (dict(band=float("nan")), ValueError, "band must be finite"),
        (dict(band=1e9), ValueError, "band must be <= 65536"),
        (dict(band="4"), TypeError, "band must be a number"),
        (dict(bounds=(1.0, -1.0)), ValueError, "bounds must have low < high"),
        (dict(bounds=2.0), TypeError, "bounds must be a pair"),
        (dict(bounds=(-1.7e308, 1.7e308)), ValueError, "bounds must lie within"),
        (dict(vertices=torch.eye(3).to_sparse()), ValueError, "vertices must be a dense tensor"),
        (dict(face_batch=torch.zeros(2).int()), ValueError, "face_batch must have shape"),
        (dict(face_batch=torch.zeros(1)), ValueError, "face_batch must have dtype"),
        (dict(face_batch=torch.tensor([-1])), ValueError, r"face_batch must be in \[0, 32768\), got -1"),
        (dict(face_batch=torch.tensor([1 << 40])), ValueError, r"face_batch must be in \[0, 32768\)"),
        (dict(backend="triton"), ValueError, "narrow_band_udf"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        narrow_band_udf(**{**TRIANGLE, **changes})
    assert "narrow_band_udf" in str(caught.value)


def test_a_band_that_cannot_fit_is_refused_before_it_is_made():
    square = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    with pytest.raises(ValueError, match="does not fit into memory"):
        narrow_band_udf(square, faces, 65536, 64.0)
    with pytest.raises(ValueError, match="too many for the reference"):
        narrow_band_udf(square, faces.repeat(100_000, 1), 65536, 64.0, backend="reference")  # 64 bits do not count them


def test_a_band_wider_than_the_grid_is_the_whole_grid():
    coords, udf, _ = narrow_band_udf(**{**TRIANGLE, "band": 300.0})
    assert len(coords) == 8**3 and udf.max() < 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_gives_nothing(backend):
    for vertices, faces in ((0, 0), (5, 0)):
        mesh = torch.zeros(vertices, 3), torch.zeros(faces, 3).long()
        coords, udf, face = narrow_band_udf(*mesh, 8, 2.0, backend=backend)
        assert coords.shape == (0, 4) and udf.shape == (0,) and face.shape == (0,)


def test_unused_vertices_may_be_anywhere_but_not_nan():
    vertices = torch.cat([torch.eye(3), torch.full((1, 3), 1e30)])
    assert len(narrow_band_udf(**{**TRIANGLE, "vertices": vertices}).coords) > 0


@any_width
@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e6, 1e20, float("inf"), float("nan")]),
    resolution=st.sampled_from([-1, 0, 1, 2, 7, 64, 65536, 1 << 20]),
    band=st.sampled_from([-1.0, 0.0, 1e-9, 0.5, 2.0, 70.0, 1e5, float("inf")]),
    bounds=st.sampled_from([(-1.0, 1.0), (0.0, 0.0), (-1e-30, 1e-30), (-1e30, 1e30), (5.0, 6.0)]),
    backend=st.sampled_from([None, "native"]),
)
def test_anything_gives_a_band_or_a_clear_error(seed, size, resolution, band, bounds, backend):
    mesh = soup(generator(seed), 5, 4)
    if resolution == 65536 and size in (1.0, 1e-30):  # in bounds as large: minutes of work, and all memory
        size *= 1e-3
    try:
        coords, udf, face = narrow_band_udf(
            mesh["vertices"] * size, mesh["faces"], resolution, band, bounds=bounds, backend=backend
        )
    except (ValueError, TypeError) as error:
        assert "narrow_band_udf" in str(error)
        return
    assert (coords[:, 1:] >= 0).all() and (coords[:, 1:] < resolution).all()
    assert udf.isfinite().all() and (udf >= 0).all() and ((face >= 0) & (face < 4)).all()


# --- the device pipeline, on the host ---------------------------------------------------------------------------------


def pipeline(vertices, faces, resolution, band, face_batch=None, bounds=(-1.0, 1.0), status=0, **limits):
    batch = torch.zeros(0).long() if face_batch is None else face_batch.long()
    module = native_module()
    *out, found = module.narrow_band_pipeline(
        vertices.numpy(), faces.long().numpy(), batch.numpy(), resolution, band, *bounds, **limits
    )
    assert found == status
    return tuple(torch.from_numpy(t) for t in out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@any_width
@settings(max_examples=30)
@given(mesh=soups, resolution=st.integers(1, 12), band=st.floats(0.1, 9), low=st.sampled_from([-1.0, -0.3, 5.0]))
def test_device_pipeline_is_the_reference_bit_for_bit(dtype, mesh, resolution, band, low):
    mesh = {**mesh, "vertices": mesh["vertices"].to(dtype), "resolution": resolution, "band": band}
    mesh["bounds"] = (low, low + 1.7)
    band = pipeline(**mesh)
    assert_same_band(band, brute_force(**{**mesh, "vertices": mesh["vertices"].double()}), mesh)
    if dtype == torch.float32:  # in float64 torch's square root may be off in the last bit
        same = narrow_band_udf(**mesh, backend="reference")
        assert all(torch.equal(a, b) for a, b in zip(band, same))


def test_device_pipeline_on_volumes_and_large_grids():
    mesh = soup(generator(1), 30, 40)
    kwargs = dict(vertices=mesh["vertices"] * 0.3, faces=mesh["faces"], resolution=40, band=2.3)
    for extra in (dict(), dict(face_batch=torch.arange(40) % 3), dict(bounds=(-9000.0, 9000.0), resolution=65536)):
        got = pipeline(**{**kwargs, **extra})
        same = narrow_band_udf(**{**kwargs, **extra}, backend="reference")
        assert_same_band(got, (same.coords, same.udf), {**kwargs, **extra})
        assert all(torch.equal(a, b) for a, b in zip(got, same))


def test_device_pipeline_leaves_out_what_it_cannot_use():
    vertices = torch.cat([torch.eye(3) * 0.5, torch.tensor([[math.nan] * 3, [math.inf, 0, 0], [1e30, 0, 0]])])
    bad = torch.tensor([[0, 1, 3], [0, 1, 4], [0, 1, 5], [0, 1, 6], [-1, 1, 2], [0, 1, 1 << 40]])
    good = pipeline(vertices, torch.tensor([[0, 1, 2]]), 16, 2.0)
    both = pipeline(vertices, torch.cat([bad, torch.tensor([[0, 1, 2]])]), 16, 2.0)
    assert torch.equal(good[0], both[0]) and torch.equal(good[1], both[1]) and (both[2] == 6).all()
    batch = torch.tensor([-1, 1 << 15, 5])
    chosen = pipeline(vertices, torch.tensor([[0, 1, 2]] * 3), 16, 2.0, face_batch=batch)
    assert torch.equal(good[0][:, 1:], chosen[0][:, 1:]) and (chosen[0][:, 0] == 5).all() and (chosen[2] == 2).all()
    assert len(pipeline(vertices, bad, 16, 2.0)[0]) == len(pipeline(vertices, bad[:0], 16, 2.0)[0]) == 0


@pytest.mark.parametrize("resolution, band, memory", [(64, 4.0, 1 << 18), (64, 60.0, 1 << 12)])
def test_device_pipeline_refuses_what_does_not_fit(resolution, band, memory):
    too_large = 5
    coords, _, _ = pipeline(TRIANGLE["vertices"], TRIANGLE["faces"], resolution, band, status=too_large, memory=memory)
    assert len(coords) == 0
