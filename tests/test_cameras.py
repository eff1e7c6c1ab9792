"""Cameras: round trips, invariants, independent formulas, converters, bad input."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from cvctoolkit.ops import (
    camera_rays,
    cameras_from_pytorch3d,
    disparity_to_depth,
    epipolar_points,
    intrinsics_from_extent,
    intrinsics_from_fov,
    intrinsics_from_normalized,
    plucker_rays,
    pool_depth,
    project_points,
    ray_to_z_depth,
    rescale_intrinsics,
    structured_depth_noise,
    unproject_depth,
    viewmats_from_c2w,
    viewmats_from_opengl,
    z_to_ray_depth,
)
from cvctoolkit.ops.cameras.samples import intrinsics, poses
from tests.oracles import oracle

seeds = st.integers(0, 2**16)
models = st.sampled_from(["pinhole", "ortho"])


def scene(seed, batch=2, height=4, width=5):
    g = torch.Generator().manual_seed(seed)
    depth = 1 + torch.rand(batch, height, width, generator=g, dtype=torch.float64)
    return depth, intrinsics(g, batch), poses(g, batch)


def pixel_grid(height, width):
    return torch.stack(torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy"), -1)


@given(seeds, models)
def test_projection_inverts_unprojection(seed, model):
    depth, Ks, viewmats = scene(seed)
    points = unproject_depth(depth, Ks, viewmats, camera_model=model)
    uv, z = project_points(points, Ks, viewmats, camera_model=model)
    assert torch.allclose(uv, pixel_grid(4, 5).double().expand_as(uv), atol=1e-9)
    assert torch.allclose(z, depth)


@given(seeds, models)
def test_points_lie_on_their_rays_at_ray_depth(seed, model):
    depth, Ks, viewmats = scene(seed)
    origins, directions = camera_rays(Ks, viewmats, 5, 4, camera_model=model)
    points = unproject_depth(depth, Ks, viewmats, camera_model=model, depth_type="ray")
    assert torch.allclose(points, origins + depth[..., None] * directions)
    assert torch.allclose(directions.norm(dim=-1), torch.ones_like(depth))


@given(seeds, models)
def test_plucker_rays_do_not_depend_on_the_point_along_the_ray(seed, model):
    depth, Ks, viewmats = scene(seed)
    rays = plucker_rays(Ks, viewmats, 5, 4, camera_model=model)
    points = unproject_depth(depth, Ks, viewmats, camera_model=model)
    assert torch.allclose(torch.linalg.cross(points, rays[..., :3]), rays[..., 3:], atol=1e-9)


@given(seeds, models)
def test_a_rigid_motion_of_the_world_moves_the_points(seed, model):
    depth, Ks, viewmats = scene(seed)
    motion = poses(torch.Generator().manual_seed(seed + 1))
    points = unproject_depth(depth, Ks, viewmats, camera_model=model)
    moved = unproject_depth(depth, Ks, viewmats @ torch.linalg.inv(motion), camera_model=model)
    assert torch.allclose(moved, points @ motion[:3, :3].mT + motion[:3, 3])


@given(seeds, models)
def test_rescaled_intrinsics_see_the_same_scene(seed, model):
    depth, Ks, viewmats = scene(seed)
    points = unproject_depth(depth, Ks, viewmats, camera_model=model)
    uv, _ = project_points(points, Ks, viewmats, camera_model=model)
    half, _ = project_points(points, rescale_intrinsics(Ks, (0.5, 2.0)), viewmats, camera_model=model)
    assert torch.allclose(half, uv * uv.new_tensor([0.5, 2.0]))


def test_against_homogeneous_coordinates():
    _, Ks, viewmats = scene(5)
    points = torch.randn(2, 9, 3, dtype=torch.float64) + 5
    homogeneous = torch.cat([points, torch.ones(2, 9, 1, dtype=torch.float64)], -1)
    image = (Ks @ (viewmats @ homogeneous.mT)[:, :3]).mT
    uv, z = project_points(points, Ks, viewmats)
    assert torch.allclose(uv, image[..., :2] / image[..., 2:])
    assert torch.allclose(z, image[..., 2])


def test_behind_the_camera_stays_finite():
    uv, z = project_points(torch.tensor([[0.0, 0, 0], [1, 1, -1]]), torch.eye(3))
    assert uv.isfinite().all() and (z <= 0).all()


class TestConverters:
    @given(seeds)
    def test_c2w(self, seed):
        viewmats = poses(torch.Generator().manual_seed(seed), 3)
        assert torch.allclose(viewmats_from_c2w(torch.linalg.inv(viewmats)), viewmats)

    def test_opengl(self):
        """A Blender camera at (0, 0, 5) with the identity rotation looks down −z."""
        c2w = torch.eye(4)
        c2w[2, 3] = 5
        uv, z = project_points(torch.tensor([[1.0, 2.0, 0.0]]), torch.eye(3), viewmats_from_opengl(c2w))
        assert z.item() == 5 and torch.allclose(uv, torch.tensor([[0.2, -0.4]]))

    def test_pytorch3d(self):
        """PyTorch3D's screen transform: x_screen = W/2 − s/2·x_ndc with s = min(W, H), and the same for y."""
        g = torch.Generator().manual_seed(0)
        R, T = poses(g)[:3, :3], torch.tensor([0.1, 0.2, 4.0], dtype=torch.float64)
        focal, center = torch.tensor([1.5, 1.7]).double(), torch.tensor([0.1, -0.2]).double()
        points = torch.randn(7, 3, generator=g, dtype=torch.float64) * 0.3
        view = points @ R + T
        ndc = focal * view[:, :2] / view[:, 2:] + center
        screen = torch.tensor([32.0, 24.0]) - ndc * 24
        Ks, viewmats = cameras_from_pytorch3d(R, T, focal, center, 64, 48)
        uv, z = project_points(points, Ks, viewmats)
        assert torch.allclose(uv, screen) and torch.allclose(z, view[:, 2])

    def test_normalized_and_fov(self):
        K = intrinsics_from_fov(torch.tensor(math.pi / 2), 64, 48)
        assert torch.allclose(K, torch.tensor([[32.0, 0, 32], [0, 32, 24], [0, 0, 1]]))
        assert torch.allclose(intrinsics_from_normalized(rescale_intrinsics(K, (1 / 64, 1 / 48)), 64, 48), K)

    def test_extent(self):
        """Wonder3D: pixel i of W looks at x = ((i + 0.5)/W − 0.5)·2 along +z."""
        K = intrinsics_from_extent(torch.tensor(2.0, dtype=torch.float64), 8, 8)
        origins, directions = camera_rays(K, torch.eye(4, dtype=torch.float64), 8, 8, camera_model="ortho")
        expected = ((torch.arange(8, dtype=torch.float64) + 0.5) / 8 - 0.5) * 2
        assert torch.allclose(origins[0, :, 0], expected) and torch.allclose(origins[:, 0, 1], expected)
        assert torch.equal(directions[..., 2], torch.ones(8, 8, dtype=torch.float64))

    @pytest.mark.parametrize("depth_type", ["z", "ray"])
    def test_kornia(self, depth_type):
        """kornia's pixels have integer centres: adding ½ to the principal point turns its K into ours."""
        kornia = oracle("kornia.geometry")
        depth, Ks, _ = scene(3)
        Ks[:, 0, 1] = 0  # kornia has no skew
        shifted = Ks.clone()
        shifted[:, :2, 2] += 0.5
        points = unproject_depth(depth, shifted, torch.eye(4).double().expand(2, 4, 4), depth_type=depth_type)
        expected = kornia.depth.depth_to_3d_v2(depth, Ks, normalize_points=depth_type == "ray")
        assert torch.allclose(points, expected, atol=1e-6)  # kornia's grid of pixels is float32
        for b in range(2):
            flat = points[b].flatten(0, 1)
            uv = kornia.camera.project_points(flat, Ks[b].expand(len(flat), 3, 3))
            assert torch.allclose(project_points(flat, shifted[b]).uv, uv + 0.5)


def test_geometry_is_not_rounded_by_autocast():
    depth, Ks, viewmats = (x.float() for x in scene(0))
    noise = [torch.rand(2, 3, 3)]
    calls = [
        lambda: unproject_depth(depth, Ks, viewmats),
        lambda: project_points(torch.randn(2, 9, 3) + 4, Ks, viewmats).uv,
        lambda: plucker_rays(Ks, viewmats, 5, 4),
        lambda: viewmats_from_opengl(viewmats),
        lambda: structured_depth_noise(depth, (3,), (0.1,), noise=noise),
    ]
    for call in calls:
        torch.manual_seed(0)
        expected = call()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(), expected)


def rig(seed, views=3, height=4, width=5):
    """Cameras round the origin that all see it."""
    g = torch.Generator().manual_seed(seed)
    viewmats = poses(g, views)
    viewmats[:, :3, 3] = torch.tensor([0.0, 0.0, 4.0])
    depth = 3.5 + torch.rand(views, height, width, generator=g, dtype=torch.float64)
    return depth, intrinsics(g, views), viewmats


SEGMENT = dict(width=10, height=8, num_samples=5, radius=0.4)


class TestEpipolarPoints:
    @given(seeds, models, st.sampled_from(["z", "ray"]))
    def test_against_a_loop(self, seed, model, depth_type):
        """Restated pixel by pixel with homogeneous matrices, the neighbour by the public projection of one point."""
        depth, Ks, viewmats = rig(seed)
        jitter = torch.rand(3, 4, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        out = epipolar_points(depth, Ks, viewmats, jitter=jitter, camera_model=model, depth_type=depth_type, **SEGMENT)
        assert out.uv.shape == (3, 4, 5, 5, 2, 2) and out.depth.shape == (3, 4, 5, 5, 2)
        small = rescale_intrinsics(Ks, 0.5)
        surface = unproject_depth(depth, small, viewmats, camera_model=model, depth_type=depth_type)
        for view, row, column, k in [(0, 0, 0, 0), (1, 3, 4, 2), (2, 1, 3, 4)]:
            nearer = depth.clone()
            nearer[view, row, column] -= 0.5
            other = unproject_depth(nearer, small, viewmats, camera_model=model, depth_type=depth_type)
            ray = F.normalize(surface[view, row, column] - other[view, row, column], dim=0)
            delta = -0.4 + (k + jitter[view, row, column, k]) * 2 * 0.4 / 5
            point = surface[view, row, column] + delta * ray
            assert torch.allclose(out.points[view, row, column, k], point)
            for slot, neighbor in enumerate(j for j in range(3) if j != view):
                uv, z = project_points(point, Ks[neighbor], viewmats[neighbor], camera_model=model)
                assert torch.allclose(out.uv[view, row, column, k, slot], uv)
                assert torch.allclose(out.depth[view, row, column, k, slot], z)

    @given(seeds, models)
    def test_a_rigid_motion_of_the_scene_changes_no_pixel(self, seed, model):
        depth, Ks, viewmats = rig(seed)
        motion = poses(torch.Generator().manual_seed(seed + 1))
        before = epipolar_points(depth, Ks, viewmats, camera_model=model, **SEGMENT)
        after = epipolar_points(depth, Ks, viewmats @ torch.linalg.inv(motion), camera_model=model, **SEGMENT)
        assert torch.allclose(before.uv, after.uv, atol=1e-7) and torch.allclose(before.depth, after.depth)

    @given(seeds)
    def test_the_uv_lie_on_the_epipolar_line(self, seed):
        """x'ᵀ F x = 0 with F = K'⁻ᵀ [t]ₓ R K⁻¹ (Hartley & Zisserman, Eq. 9.2)."""
        depth, Ks, viewmats = rig(seed, views=2)
        uv = epipolar_points(depth, Ks, viewmats, **SEGMENT).uv[0, ..., 0, :]
        relative = viewmats[1] @ torch.linalg.inv(viewmats[0])
        x, y, z = relative[:3, 3]
        zero = torch.zeros_like(x)
        cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).reshape(3, 3)
        fundamental = torch.linalg.inv(Ks[1]).mT @ cross @ relative[:3, :3] @ torch.linalg.inv(Ks[0])
        pixel = F.pad(pixel_grid(4, 5).double() * 2, (0, 1), value=1)  # in the full-size image
        line = F.normalize((pixel @ fundamental.mT)[..., None, :].expand(4, 5, 5, 3), dim=-1)
        assert ((F.pad(uv, (0, 1), value=1) * line).sum(-1).abs() < 1e-7 * (1 + uv.norm(dim=-1))).all()

    def test_the_whole_line_is_ray_depth_and_its_radius(self):
        depth, Ks, viewmats = rig(0)
        near, far = 2.0, 5.0
        line = epipolar_points(
            torch.full_like(depth, (near + far) / 2), Ks, viewmats, depth_type="ray", width=10, height=8,
            num_samples=6, radius=(far - near) / 2,
        )  # fmt: skip
        origins, directions = camera_rays(rescale_intrinsics(Ks, 0.5), viewmats, 5, 4)
        t = near + (torch.arange(6) + 0.5) * (far - near) / 6
        expected = origins[..., None, :] + t[:, None].double() * directions[..., None, :]
        assert torch.allclose(line.points, expected)

    def test_chosen_views(self):
        depth, Ks, viewmats = rig(1)
        every = epipolar_points(depth, Ks, viewmats, **SEGMENT)
        some = epipolar_points(depth[[2, 0]], Ks, viewmats, reference_index=[2, 0], **SEGMENT)
        assert torch.equal(some.uv, every.uv[[2, 0]])
        swapped = epipolar_points(depth, Ks, viewmats, neighbor_index=[[2, 1], [2, 0], [1, 0]], **SEGMENT)
        assert torch.equal(swapped.uv, every.uv.flip(-2))
        assert torch.equal(
            epipolar_points(depth[:1], Ks, viewmats, reference_index=[0], neighbor_index=[[2], [0], [0]], **SEGMENT).uv,
            every.uv[:1, ..., 1:, :],
        )
        absent = epipolar_points(depth, Ks, viewmats, neighbor_index=[[1, 2], [0, -1], [0, 1]], **SEGMENT)
        assert absent.uv[1, ..., 1, :].isnan().all() and absent.depth.isnan().sum() == 4 * 5 * 5
        itself = epipolar_points(depth, Ks, viewmats, neighbor_index=[[0], [1], [2]], **SEGMENT)
        own = pixel_grid(4, 5).double()[:, :, None] * 2
        assert torch.allclose(itself.uv[..., 0, :], own.expand(3, 4, 5, 5, 2))

    def test_a_hole_in_the_depth_is_a_hole_in_the_points(self):
        depth, Ks, viewmats = rig(1)
        depth[0, 1, 2] = float("nan")
        points = epipolar_points(depth, Ks, viewmats, **SEGMENT).points
        assert points[0, 1, 2].isnan().all() and points.isnan().sum() == 15

    def test_compiles_to_one_graph(self):
        inputs = rig(1)
        compiled = torch.compile(
            lambda d, K, v: epipolar_points(d, K, v, **SEGMENT).uv, fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(*inputs), epipolar_points(*inputs, **SEGMENT).uv)


class TestDepthMaps:
    @given(seeds)
    def test_ray_depth(self, seed):
        depth, Ks, _ = scene(seed)
        ray = z_to_ray_depth(depth, Ks)
        assert torch.allclose(unproject_depth(depth, Ks).norm(dim=-1), ray)
        assert torch.allclose(ray_to_z_depth(ray, Ks), depth)
        assert torch.allclose(unproject_depth(ray, Ks, depth_type="ray"), unproject_depth(depth, Ks))

    @given(seeds, st.integers(1, 7), st.integers(1, 7))
    def test_pooling_is_the_mean_of_the_valid_pixels(self, seed, height, width):
        g = torch.Generator().manual_seed(seed)
        depth = torch.rand(2, 7, 6, generator=g, dtype=torch.float64)
        depth[torch.rand(depth.shape, generator=g) < 0.3] = float("nan")
        mask = torch.rand(depth.shape, generator=g) > 0.2
        pooled = pool_depth(depth, height, width, mask=mask)
        for i in range(height):
            for j in range(width):
                rows = slice(i * 7 // height, -((i + 1) * -7 // height))
                columns = slice(j * 6 // width, -((j + 1) * -6 // width))
                window = depth[:, rows, columns].masked_fill(~mask[:, rows, columns], float("nan")).flatten(1)
                assert torch.allclose(pooled[:, i, j], window.nanmean(1), equal_nan=True)

    def test_pooling_a_full_map_is_adaptive_average_pooling(self):
        depth = torch.rand(2, 3, 8, 6)
        assert torch.allclose(pool_depth(depth, 4, 3), F.adaptive_avg_pool2d(depth, (4, 3)))

    def test_holes_get_no_gradient_and_poison_none(self):
        depth = torch.rand(4, 4)
        depth[0, 0], depth[:2, 2:] = float("inf"), float("nan")
        pooled = pool_depth(depth.requires_grad_(), 2, 2)
        assert pooled.isnan().tolist() == [[False, True], [False, False]]
        pooled.nansum().backward()
        third = torch.full((2, 2), 1 / 3)
        third[0, 0] = 0
        assert torch.allclose(
            depth.grad, torch.cat([torch.cat([third, torch.zeros(2, 2)], 1), torch.full((2, 4), 0.25)])
        )

    @given(seeds, st.integers(1, 40), st.integers(1, 40), st.booleans())
    def test_noise_is_a_sum_of_interpolated_grids(self, seed, height, width, shared):
        g = torch.Generator().manual_seed(seed)
        depth = torch.rand(2, 3, height, width, generator=g, dtype=torch.float64)
        noise = [torch.rand(2, 1 if shared else 3, r, r, generator=g, dtype=torch.float64) * 2 - 1 for r in (3, 16, 31)]
        expected = depth
        for grid, scale in zip(noise, (0.3, 0.2, 0.1)):
            up = F.interpolate(grid, (height, width), mode="bilinear", align_corners=False)
            expected = expected + scale * up
        assert torch.allclose(structured_depth_noise(depth, (3, 16, 31), (0.3, 0.2, 0.1), noise=noise), expected)

    def test_noise_from_a_generator(self):
        depth = torch.rand(2, 3, 20, 30)

        def noisy(seed, **options):
            return structured_depth_noise(depth, generator=torch.Generator().manual_seed(seed), **options) - depth

        first = noisy(0)
        assert torch.equal(first, noisy(0)) and not torch.equal(first, noisy(1))
        assert first.abs().max() <= 0.1 + 0.1 / 3 + 0.1 / 9
        assert not torch.allclose(first[0, 0], first[0, 1]) and not torch.allclose(first[0, 0], first[1, 0])
        shared = noisy(0, shared=True)
        assert torch.allclose(shared[:, 0], shared[:, 2], atol=1e-6) and not torch.allclose(shared[0], shared[1])

    def test_noise_leaves_masked_pixels_and_holes_alone(self):
        depth = torch.rand(3, 8, 8)
        depth[0, 0, 0] = float("nan")
        mask = torch.rand(3, 8, 8) > 0.5
        noisy = structured_depth_noise(depth, mask=mask)
        assert torch.equal(noisy[~mask].nan_to_num(9), depth[~mask].nan_to_num(9))
        assert noisy.isnan().sum() == 1 and (noisy[mask] != depth[mask]).any()

    def test_noise_compiles_to_one_graph(self):
        compiled = torch.compile(structured_depth_noise, fullgraph=True, backend="aot_eager")
        depth = torch.rand(2, 9, 9)
        torch.manual_seed(0)
        out = compiled(depth, (3, 5), (0.1, 0.2))
        assert out.shape == depth.shape and (out - depth).abs().max() <= 0.3


def test_disparity():
    disparity = torch.tensor([[10.0, 0.0, float("inf"), -40.0]])
    depth = disparity_to_depth(disparity, 1000.0, 0.2, offset=30.0)
    assert torch.allclose(depth[0, :2], torch.tensor([5.0, 200 / 30]))
    assert depth[0, 2:].isnan().all()


VIEWS = dict(
    depth=torch.ones(2, 4, 4), Ks=torch.eye(3).repeat(2, 1, 1), viewmats=torch.eye(4).repeat(2, 1, 1), **SEGMENT
)
NO_FOCAL, SHEARED, MIRRORED = VIEWS["Ks"].clone(), VIEWS["viewmats"].clone(), VIEWS["viewmats"].clone()
NO_FOCAL[1, 0, 0], SHEARED[0, 0, 1], MIRRORED[1, 2, 2] = 0, 0.5, -1
ONE = dict(depth=torch.ones(1, 4, 4), Ks=torch.eye(3)[None], viewmats=torch.eye(4)[None])

BAD = [
    (epipolar_points, {**VIEWS, **ONE}, ValueError, "at least 2 views"),
    (epipolar_points, {**VIEWS, "depth": torch.ones(4, 4)}, ValueError, "depth must have shape"),
    (epipolar_points, {**VIEWS, "depth": torch.ones(3, 4, 4)}, ValueError, "must hold 2 reference views"),
    (epipolar_points, {**VIEWS, "viewmats": torch.eye(4)[None]}, ValueError, "viewmats must hold 2 views"),
    (epipolar_points, {**VIEWS, "Ks": NO_FOCAL}, ValueError, "focal lengths other than 0"),
    (epipolar_points, {**VIEWS, "Ks": VIEWS["Ks"] * float("nan")}, ValueError, "must be finite, with focal"),
    (epipolar_points, {**VIEWS, "viewmats": SHEARED}, ValueError, "viewmats must be rigid"),
    (epipolar_points, {**VIEWS, "viewmats": MIRRORED}, ValueError, "viewmats must be rigid"),
    (epipolar_points, {**VIEWS, "viewmats": 2 * VIEWS["viewmats"]}, ValueError, "viewmats must be rigid"),
    (epipolar_points, {**VIEWS, "num_samples": 0}, ValueError, "num_samples must be >= 1"),
    (epipolar_points, {**VIEWS, "num_samples": 2.0}, TypeError, "num_samples must be an integer"),
    (epipolar_points, {**VIEWS, "radius": -1.0}, ValueError, "radius must be >= 0"),
    (epipolar_points, {**VIEWS, "width": 0}, ValueError, "width must be >= 1"),
    (epipolar_points, {**VIEWS, "jitter": torch.ones(4)}, ValueError, "jitter must broadcast"),
    (epipolar_points, {**VIEWS, "neighbor_index": [[1], [2]]}, ValueError, "must index views 0 to 1, got 2"),
    (epipolar_points, {**VIEWS, "neighbor_index": [[1]]}, ValueError, "neighbor_index must have 2 rows, one per view"),
    (epipolar_points, {**VIEWS, "reference_index": [-1, 0]}, ValueError, "must index views 0 to 1, got -1"),
    (structured_depth_noise, dict(depth=torch.ones(4, 4), sizes=(3,)), ValueError, "equally many, got 1 and 3"),
    (structured_depth_noise, dict(depth=torch.ones(4, 4), generator=3), TypeError, "torch.Generator"),
    (structured_depth_noise, dict(depth=torch.ones(4)), ValueError, "depth must have shape"),
    (structured_depth_noise, dict(depth=torch.ones(4, 4), noise=[torch.ones(3, 3)]), ValueError, "hold 3 grids"),
    (pool_depth, dict(depth=torch.ones(4, 0), height=1, width=1), ValueError, "at least one pixel"),
    (pool_depth, dict(depth=torch.ones(4, 4), height=0, width=1), ValueError, "height must be >= 1"),
    (pool_depth, dict(depth=torch.ones(4, 4), height=1, width=1, mask=torch.ones(4, 4)), ValueError, "dtype bool"),
    (z_to_ray_depth, dict(depth=torch.ones(4, 4), Ks=torch.eye(4)), ValueError, "Ks must have shape"),
    (ray_to_z_depth, dict(depth=torch.ones(4, 4), Ks=torch.eye(3).double()), ValueError, "Ks must have dtype"),
    (intrinsics_from_extent, dict(extent=2.0, width=4, height=4), TypeError, "extent must be a torch.Tensor"),
    (unproject_depth, dict(depth=torch.ones(2, 4, 4), Ks=torch.eye(4)), ValueError, "Ks must have shape"),
    (unproject_depth, dict(depth=torch.ones(4, 4), Ks=torch.eye(3).double()), ValueError, "Ks must have dtype"),
    (unproject_depth, dict(depth=torch.ones(2, 4, 4), Ks=torch.eye(3).repeat(3, 1, 1)), ValueError, "do not broadcast"),
    (unproject_depth, dict(depth=torch.ones(4, 4), Ks=torch.eye(3), depth_type="x"), ValueError, "depth_type must be"),
    (unproject_depth, dict(depth=torch.ones(4, 4), Ks=torch.eye(3), camera_model="x"), ValueError, "camera_model must"),
    (unproject_depth, dict(depth=None, Ks=torch.eye(3)), TypeError, "depth must be a torch.Tensor"),
    (project_points, dict(points=torch.ones(4, 2), Ks=torch.eye(3)), ValueError, "points must have shape"),
    (project_points, dict(points=torch.ones(3), Ks=torch.eye(3).expand(2, 3, 3)), ValueError, "leading dimensions"),
    (plucker_rays, dict(Ks=torch.eye(3), viewmats=torch.eye(4), width=-1, height=3), ValueError, "width must be >= 0"),
    (
        plucker_rays,
        dict(Ks=torch.eye(3), viewmats=torch.eye(4), width=2**20, height=2**20),
        ValueError,
        "a map of rays of 24576.0 GiB does not fit",
    ),
    (plucker_rays, dict(Ks=torch.eye(3), viewmats=None, width=1, height=3), TypeError, "viewmats must be"),
    (camera_rays, dict(Ks=torch.eye(3), viewmats=torch.eye(4).double(), width=1, height=3), ValueError, "dtype"),
    (rescale_intrinsics, dict(Ks=torch.eye(3), scale=0.0), ValueError, "scale must be > 0"),
    (disparity_to_depth, dict(disparity=torch.ones(2, 2), focal=0.0, baseline=1.0), ValueError, "focal must be > 0"),
]


@pytest.mark.parametrize("function,kwargs,error,message", BAD, ids=[f"{f.__name__}-{m[:24]}" for f, _, _, m in BAD])
def test_bad_input(function, kwargs, error, message):
    with pytest.raises(error, match=message) as caught:
        function(**kwargs)
    assert function.__name__ in str(caught.value)
