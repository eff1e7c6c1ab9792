"""Inputs for the contract tests of `narrow_band_udf` and what surrounds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cvctoolkit.ops.mesh.reference import closest_point_on_triangle
from cvctoolkit.ops.mesh.samples import cube, height_field, soup
from cvctoolkit.ops.sdf.chain import thin_sdf_from_pointmap
from cvctoolkit.ops.sdf.grid import corner_grid_bounds, grid_to_world, world_to_grid
from cvctoolkit.ops.sdf.op import narrow_band_udf, udf_to_thin_sdf
from cvctoolkit.ops.sdf.reference import voxel_centers
from cvctoolkit.testing import Sample, maker

Build = Callable[[torch.Generator], dict[str, Any]]

#: Rounding of a float32 distance, in voxels; at the threshold it decides who is in the band.
ROUNDING = 1e-5


def band_names(coords: Tensor) -> Tensor:
    """One number per voxel, ascending in lexicographic order."""
    b, x, y, z = coords.long().unbind(-1)
    return ((b << 16 | x) << 16 | y) << 16 | z


def assert_same_band(result: Any, exact: Any, kwargs: dict[str, Any]) -> None:
    """Same voxels but for rounding at the threshold, same distances, and faces that are that near."""
    lo, hi = kwargs.get("bounds", (-1.0, 1.0))
    voxel = (hi - lo) / kwargs["resolution"]
    coords, udf, face = (t.detach().cpu() for t in result)
    names, exact_names = band_names(coords), band_names(exact[0])
    assert (names[1:] > names[:-1]).all(), "coords are not in ascending order, or twice"
    rim = kwargs["band"] * voxel - ROUNDING * voxel
    found, expected = torch.isin(names, exact_names), torch.isin(exact_names, names)
    assert (udf[~found] > rim).all(), f"{int((udf[~found] <= rim).sum())} voxels too many"
    assert (exact[1][~expected] > rim).all(), f"{int((exact[1][~expected] <= rim).sum())} voxels missing"
    error = (udf[found].double() - exact[1][expected].double()).abs()
    assert (error <= ROUNDING * voxel).all(), f"a distance is off by {error.max() / voxel:.2g} voxel"

    corners = kwargs["vertices"].double().cpu()[kwargs["faces"].long().cpu()[face]]
    to_face, _ = closest_point_on_triangle(voxel_centers(coords, kwargs["resolution"], lo, hi), *corners.unbind(1))
    assert ((to_face - udf.double()).abs() <= ROUNDING * voxel).all(), "a face is not nearest"
    if kwargs.get("face_batch") is not None:
        assert torch.equal(kwargs["face_batch"].cpu()[face].int(), coords[:, 0]), "a face is of another volume"


def _compare(build: Build) -> Callable[[Any, Any, Any], None]:
    def compare(result: Any, same: Any, exact: Any) -> None:
        assert [t.dtype for t in result] == [t.dtype for t in same]
        assert_same_band(result, exact, maker(build)(torch.float64, "cpu"))

    return compare


def _inside(mesh: dict[str, Tensor], scale: float) -> dict[str, Any]:
    return {**mesh, "vertices": mesh["vertices"] * scale}


def _needles(g: torch.Generator) -> dict[str, Tensor]:
    """Points, segments and needles among triangles far smaller and far larger than a voxel."""
    at = torch.rand(60, 1, 3, generator=g) * 1.6 - 0.8
    spread = torch.randn(60, 3, 3, generator=g) * 10 ** (torch.rand(60, 1, 1, generator=g) * 7 - 6)
    corners = at + spread
    corners[:6] = corners[:6, :1]  # points
    corners[6:12, 2] = corners[6:12, 0]  # segments
    corners[12:24, 2] = 0.3 * corners[12:24, 0] + 0.7 * corners[12:24, 1]  # needles, as straight as rounding allows
    return dict(vertices=corners.reshape(-1, 3), faces=torch.arange(180).reshape(60, 3))


def _band_samples() -> list[Sample]:
    def two_volumes(g: torch.Generator) -> dict[str, Any]:
        mesh = soup(g, 30, 40)
        return dict(**_inside(mesh, 0.4), resolution=24, band=2.0, face_batch=torch.arange(40) % 3)

    cases: list[tuple[str, Build, bool]] = [
        ("small", lambda g: dict(**_inside(height_field(g, 3), 0.6), resolution=9, band=2.3), True),
        ("surface", lambda g: dict(**_inside(height_field(g, 12), 0.8), resolution=37, band=3.1), True),
        ("soup", lambda g: dict(**_inside(soup(g, 30, 40), 0.3), resolution=32, band=4.0), True),
        ("volumes", two_volumes, True),
        ("ties", lambda g: dict(**_inside(cube(), 0.5), resolution=16, band=2.5), False),
        ("over-the-border", lambda g: dict(**_inside(height_field(g, 6), 3.0), resolution=20, band=2.0), True),
        ("needles", lambda g: dict(**_needles(g), resolution=30, band=3.0), False),
        ("wide", lambda g: dict(**_inside(soup(g, 9, 12), 0.3), resolution=16, band=40.0), False),
        ("shifted", lambda g: dict(**soup(g, 9, 12), resolution=21, band=2.0, bounds=(0.5, 1.5)), False),
        (
            "empty",
            lambda g: dict(vertices=torch.zeros(3, 3), faces=torch.zeros(0, 3).int(), resolution=8, band=2.0),
            False,
        ),
        (
            "empty-band",
            lambda g: dict(vertices=torch.full((3, 3), 5.0), faces=torch.tensor([[0, 1, 2]]), resolution=8, band=2.0),
            False,
        ),
    ]
    return [
        Sample(
            narrow_band_udf,
            name,
            maker(build),
            ("vertices",) if smooth else (),
            gradcheck=name == "small",
            compare=_compare(build),
        )
        for name, build, smooth in cases
    ]


def _pointmap(g: torch.Generator, height: int, width: int, batch: tuple[int, ...] = ()) -> dict[str, Any]:
    v, u = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    points = torch.stack([u, v, 3 + 0.3 * torch.sin(4 * u) * v], -1).expand(*batch, height, width, 3).clone()
    points = points * (1 + torch.arange(points[..., 0, 0, 0].numel()).reshape(*batch, 1, 1, 1))
    points[..., height // 2, width // 2, :] = float("nan")
    return dict(points=points, mask=torch.rand(*batch, height, width, generator=g) > 0.05)


def _same_chain(result: Any, same: Any, exact: Any) -> None:
    """The mesh, its normalisation and, but for rounding at the rim, the voxels and values of float64."""
    for a, b in zip(result, same):
        assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.equal(result.faces.cpu(), exact.faces) and torch.equal(result.pixel_index.cpu(), exact.pixel_index)
    for name in ("vertices", "center", "scale"):
        torch.testing.assert_close(getattr(result, name).cpu().double(), getattr(exact, name), rtol=1e-5, atol=1e-6)
    names, exact_names = band_names(result.coords.cpu()), band_names(exact.coords)
    found, expected = torch.isin(names, exact_names), torch.isin(exact_names, names)
    sdf = result.sdf.cpu().double()
    assert (sdf[~found] > 1 - 1e-4).all() and (exact.sdf[~expected] > 1 - 1e-4).all(), "a voxel too many, or missing"
    assert (sdf.abs() <= 1).all() and ((sdf[found] - exact.sdf[expected]).abs() < 1e-4).all()


def _same_bounds(result: Any, same: Any, exact: Any) -> None:
    assert result == same == exact


def samples() -> list[Sample]:
    chain = [
        ("one", lambda g: dict(**_pointmap(g, 8, 10), resolution=32, band=3.0)),
        ("two", lambda g: dict(**_pointmap(g, 6, 7, (2,)), resolution=24, band=2.0, edge_rtol=0.5)),
        ("empty", lambda g: dict(points=torch.zeros(4, 5, 3), mask=torch.zeros(4, 5).bool(), resolution=16, band=2.0)),
    ]
    values = [
        ("inside", lambda g: dict(udf=torch.rand(3, 5, generator=g), threshold=1.0), True),
        (
            "beyond",
            lambda g: dict(udf=torch.rand(40, generator=g) + torch.tensor([0.0, 1.0]).repeat(20), threshold=1.0),
            True,
        ),
        ("empty", lambda g: dict(udf=torch.zeros(0), threshold=0.1), False),
    ]
    places = [
        ("center", lambda g: torch.randn(7, 3, generator=g), dict(resolution=13, bounds=(0.5, 2.0))),
        ("corner", lambda g: torch.randn(2, 7, 3, generator=g), dict(resolution=13, samples="corner")),
        ("empty", lambda g: torch.zeros(0, 3), dict(resolution=4)),
    ]
    return [
        *_band_samples(),
        *(Sample(udf_to_thin_sdf, n, maker(build), ("udf",) if grads else ()) for n, build, grads in values),
        *(Sample(thin_sdf_from_pointmap, n, maker(build), compare=_same_chain) for n, build in chain),
        *(Sample(grid_to_world, n, maker(lambda g, b=b, k=k: dict(index=b(g), **k)), ("index",)) for n, b, k in places),
        *(
            Sample(world_to_grid, n, maker(lambda g, b=b, k=k: dict(points=b(g), **k)), ("points",))
            for n, b, k in places
        ),
        Sample(corner_grid_bounds, "unit", lambda dtype, device: dict(resolution=5), compare=_same_bounds),
        Sample(corner_grid_bounds, "empty-inside", lambda dtype, device: dict(resolution=2), compare=_same_bounds),
    ]
