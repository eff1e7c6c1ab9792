"""The data that the benchmarks run on, made once and cached under ``benchmarks/data/`` (not committed).

A small scene (the Stanford bunny that ships in pymeshlab's wheel, a sphere, a torus, a curved backdrop) is ray-cast to
a square point map with depth discontinuities; the valid pixels are those hit and not on a depth edge; the result is
scaled into [-1, 1]³. Where pymeshlab and Open3D are missing (a GPU machine without network) an analytic scene of
spheres takes its place, and the rows name the scene.
"""

from __future__ import annotations

import pathlib
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

DATA = pathlib.Path(__file__).parent / "data"
EYE, TARGET, UP, FOV = np.array([0.5, 0.5, 3.2]), np.array([0, 0.0, -0.1]), np.array([0, 1.0, 0]), 43.0
LARGEST_HALF_EXTENT = 0.95
EDGE_RTOL = 0.03


class PointMap(NamedTuple):
    """A point map and the mesh that Alg. 1 of Consistent3DGen makes of it."""

    scene: str
    points: np.ndarray  # [H, W, 3] float32 in [-1, 1]³
    depth: np.ndarray  # [H, W] float32, NaN where nothing was hit
    mask: np.ndarray  # [H, W] bool
    vertices: np.ndarray  # [Nv, 3] float32, those used by a face
    faces: np.ndarray  # [Nf, 3] int32


def scene_name() -> str:
    """Which scene this machine can make."""
    return "bunny" if all(find_spec(name) for name in ("pymeshlab", "open3d", "trimesh")) else "spheres"


def load(size: int) -> PointMap:
    """The point map of ``size`` × ``size`` pixels, from the cache or made now."""
    scene = scene_name()
    path = DATA / f"{scene}_{size}.npz"
    if not path.exists():
        DATA.mkdir(exist_ok=True)
        np.savez(path, **make(scene, size)._asdict())
    with np.load(path) as stored:
        return PointMap(scene, *(stored[name] for name in PointMap._fields[1:]))


def camera_rays(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Origins and unit directions [size², 3] of the scene's camera, before the scaling into [-1, 1]³."""
    forward = (TARGET - EYE) / np.linalg.norm(TARGET - EYE)
    right = np.cross(forward, UP) / np.linalg.norm(np.cross(forward, UP))
    down = np.cross(forward, right)
    u = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(u, u)
    slope = np.tan(np.radians(FOV / 2))
    directions = forward + slope * (x[..., None] * right + y[..., None] * down)
    directions = directions.reshape(-1, 3) / np.linalg.norm(directions.reshape(-1, 3), axis=1, keepdims=True)
    return np.broadcast_to(EYE, directions.shape), directions


def band_queries(vertices: np.ndarray, faces: np.ndarray, count: int, half_width: float) -> np.ndarray:
    """Random points [count, 3] float32 within about ``half_width`` of the mesh, in random order."""
    rng = np.random.default_rng(0)
    triangles = vertices[faces[rng.integers(len(faces), size=count)]]
    weights = rng.dirichlet((1, 1, 1), size=count)
    points = (triangles * weights[:, :, None]).sum(1) + rng.uniform(-half_width, half_width, (count, 3)) / np.sqrt(3)
    return points.astype(np.float32)


def morton_order(points: np.ndarray) -> np.ndarray:
    """The permutation that sorts points in [-1, 1]³ along a 3 × 10 bit Morton curve."""
    cells = np.clip((points + 1) * 512, 0, 1023).astype(np.uint64)
    keys = np.zeros(len(points), np.uint64)
    for bit in range(10):
        for axis in range(3):
            keys |= ((cells[:, axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(3 * bit + axis)
    return np.argsort(keys, kind="stable")


def make(scene: str, size: int) -> PointMap:
    origins, directions = camera_rays(size)
    t = (_cast_bunny if scene == "bunny" else _cast_spheres)(origins, directions)
    hit = np.isfinite(t)
    points = origins + directions * np.where(hit, t, 0)[:, None]
    depth = (points - EYE) @ ((TARGET - EYE) / np.linalg.norm(TARGET - EYE))
    hit &= (np.abs(points[:, 0]) < 1.25) & (points[:, 2] > -1.45)  # keeps the far backdrop out
    points, depth, hit = points.reshape(size, size, 3), depth.reshape(size, size), hit.reshape(size, size)
    depth = np.where(hit, depth, np.nan)
    mask = hit & ~_depth_edge(depth)

    i, j = np.nonzero(mask[:-1, :-1] & mask[:-1, 1:] & mask[1:, :-1] & mask[1:, 1:])
    p1 = i * size + j
    p2, p3, p4 = p1 + 1, p1 + size, p1 + size + 1
    faces = np.stack([p1, p3, p2, p2, p3, p4], -1).reshape(-1, 3)
    used, faces = np.unique(faces, return_inverse=True)
    vertices = points.reshape(-1, 3)[used]
    centre, extent = (vertices.min(0) + vertices.max(0)) / 2, np.ptp(vertices, axis=0).max()
    scale = 2 * LARGEST_HALF_EXTENT / extent
    return PointMap(
        scene,
        ((points - centre) * scale).astype(np.float32),
        depth.astype(np.float32),
        mask,
        ((vertices - centre) * scale).astype(np.float32),
        faces.reshape(-1, 3).astype(np.int32),
    )


def _depth_edge(depth: np.ndarray) -> np.ndarray:
    import torch
    import torch.nn.functional as F

    d = torch.from_numpy(depth)[None, None]
    jump = F.max_pool2d(d.nan_to_num(-1e9), 3, 1, 1) + F.max_pool2d((-d).nan_to_num(-1e9), 3, 1, 1)
    return ((jump / d).nan_to_num(0) > EDGE_RTOL)[0, 0].numpy()


def _cast_bunny(origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
    import open3d
    import pymeshlab
    import trimesh

    path = pathlib.Path(pymeshlab.__file__).parent / "tests/sample_meshes/bunny.obj"
    bunny = trimesh.load(path, process=False, force="mesh")
    bunny.apply_translation(-bunny.bounds.mean(0))
    bunny.apply_scale(2 / bunny.extents.max())
    sphere = trimesh.creation.icosphere(subdivisions=6, radius=0.55)
    sphere.apply_translation([0.55, 0.45, -0.7])
    torus = trimesh.creation.torus(0.55, 0.2, major_sections=512, minor_sections=256)
    torus.apply_transform(trimesh.transformations.rotation_matrix(0.7, [1, 0.3, 0]))
    torus.apply_translation([-0.55, 0.5, -0.8])
    backdrop = trimesh.creation.icosphere(subdivisions=7, radius=2.6)
    backdrop.apply_translation([0, -3.1, -0.3])
    scene = open3d.t.geometry.RaycastingScene()
    for mesh in (bunny, sphere, torus, backdrop):
        scene.add_triangles(
            open3d.core.Tensor(np.asarray(mesh.vertices, np.float32)),
            open3d.core.Tensor(np.asarray(mesh.faces, np.uint32)),
        )
    rays = np.concatenate([origins, directions], 1).astype(np.float32)
    return scene.cast_rays(open3d.core.Tensor(rays))["t_hit"].numpy().astype(np.float64)


def _cast_spheres(origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(7)
    centres = np.concatenate([rng.uniform([-0.8, -0.6, -0.8], [0.8, 0.8, 0.6], (24, 3)), [[0, -3.1, -0.3]]])
    radii = np.concatenate([rng.uniform(0.1, 0.45, 24), [2.6]])
    nearest = np.full(len(origins), np.inf)
    for centre, radius in zip(centres, radii, strict=True):
        offset = origins - centre
        b, c = (offset * directions).sum(1), (offset * offset).sum(1) - radius**2
        root = np.sqrt(np.maximum(b * b - c, 0))
        nearest = np.where((b * b > c) & (-b > root), np.minimum(nearest, -b - root), nearest)
    return nearest
