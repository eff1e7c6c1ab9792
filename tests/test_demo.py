"""The demo on small input: every kind of file that it reads, every complaint that it makes, what it leaves behind."""

import re
import zipfile

import numpy as np
import pytest
import torch

from tests.oracles import oracle

oracle("trimesh")
oracle("matplotlib")
Image = oracle("PIL.Image")

from cvctoolkit import demo  # noqa: E402
from cvctoolkit.demo import inputs, pictures  # noqa: E402

HEIGHT, WIDTH = 36, 48


def sphere_points():
    """A camera-frame point map of a sphere in front of a wall, and which pixels see the sphere."""
    x, y = np.meshgrid((np.arange(WIDTH) + 0.5) / WIDTH * 2 - 1, ((np.arange(HEIGHT) + 0.5) / HEIGHT * 2 - 1) * 0.75)
    rays = np.stack([x, y, np.full_like(x, 2.0)], -1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    b = rays @ np.array([0, 0, 4.0])
    inside = b * b - (16 - 1)
    sphere = inside > 0
    t = np.where(sphere, b - np.sqrt(np.maximum(inside, 0)), 5.5 / rays[..., 2])
    return (rays * t[..., None]).astype(np.float32), sphere


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(pictures, "PICTURE_WIDTH", 100)


@pytest.fixture
def points():
    return sphere_points()


def run(tmp_path, *arguments):
    out = tmp_path / "out"
    status = demo.main([*map(str, arguments), "--out", str(out), "--resolution", "48", "--band", "3"])
    return status, out


def assert_complete(out, name):
    import trimesh

    mesh = trimesh.load(out / f"{name}_shell.ply", process=False)
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0
    glb = trimesh.load(out / f"{name}_shell.glb", process=False, force="mesh")
    assert len(glb.faces) == len(mesh.faces)
    np.testing.assert_allclose(glb.vertices, mesh.vertices * [1, -1, -1], atol=1e-5)
    picture = np.asarray(Image.open(out / f"{name}_sheet.png"))
    assert min(picture.shape[:2]) > 400 and picture.std() > 20
    return mesh


def test_depth_and_photograph(tmp_path, points, capsys):
    depth = (points[0][..., 2] * 1000).astype(np.uint16)
    depth[:3, :3] = 0  # unknown
    Image.fromarray(depth).save(tmp_path / "room.png")
    photo = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    photo[..., 0] = 200
    Image.fromarray(photo).save(tmp_path / "photo.png")
    fov = 2 * np.degrees(np.arctan(1 / 2))
    status, out = run(tmp_path, "--depth", tmp_path / "room.png", "--image", tmp_path / "photo.png", "--fov", fov)
    assert status == 0
    mesh = assert_complete(out, "room")
    np.testing.assert_allclose(mesh.visual.vertex_colors[:, :3], [[200, 0, 0]] * len(mesh.vertices), atol=1)
    # In the input's units: the sphere's front is at depth 3, the wall at 5.5, each less the half band.
    assert 2.5 < mesh.vertices[:, 2].min() < 3 and 5.5 < mesh.vertices[:, 2].max() < 6
    text = capsys.readouterr().out
    assert "watertight" in text and "marching cubes" in text and "input points" in text


def test_motorcycle_is_the_default(tmp_path):
    oracle("skimage")
    status, out = run(tmp_path)
    assert status == 0
    assert_complete(out, "motorcycle")


def test_motorcycle_geometry():
    oracle("skimage")
    view = inputs.motorcycle()
    assert view.depth.shape == (500, 741) and view.image.shape == (1, 500, 741, 3)
    known = view.depth.isfinite()
    assert 0.92 < float(known.float().mean()) < 0.93
    # 193 mm baseline, focal length 995 pixels: the garage is 2 to 5 metres away.
    assert 2 < float(view.depth[known].min()) < float(view.depth[known].max()) < 5.1


VGGT, MOGE, DUST3R = "vggt", "moge", "dust3r"


def archive(kind, points, sphere):
    if kind == VGGT:
        confidence = np.where(sphere, 5.0, 1.0).astype(np.float32)
        images = np.full((1, 2, 3, HEIGHT, WIDTH), 0.5, np.float32)
        stack = np.stack([points, points + np.float32([0, 0, 0.3])])[None]
        return {"world_points": stack, "world_points_conf": np.stack([confidence] * 2)[None], "images": images}
    if kind == MOGE:
        return {"points": np.where(sphere[..., None], points, np.inf), "mask": sphere}
    return {
        "pts3d": points[None],
        "pts3d_in_other_view": points[None] + np.float32(0.1),
        "conf": np.ones((1, HEIGHT, WIDTH), np.float32),
        "conf_in_other_view": np.ones((1, HEIGHT, WIDTH), np.float32),
    }


@pytest.mark.parametrize("kind", [VGGT, MOGE, DUST3R])
def test_archives_of_the_networks(kind, tmp_path, points):
    path = tmp_path / f"{kind}.npz"
    np.savez(path, **archive(kind, *points))
    view = inputs.load(points=path)
    assert view.points.shape == (1 if kind == MOGE else 2, HEIGHT, WIDTH, 3)
    assert (view.mask is not None) == (kind == MOGE)
    assert (view.confidence is not None) == (kind != MOGE)
    if kind == VGGT:
        assert view.image.shape == (2, HEIGHT, WIDTH, 3) and int(view.image.max()) == 128
    status, out = run(tmp_path, "--points", path, "--percentile", 60)
    assert status == 0
    assert_complete(out, kind)


def test_confidence_drops_its_share(tmp_path, points):
    from cvctoolkit.demo import chain

    np.savez(tmp_path / "vggt.npz", **archive(VGGT, *points))
    view = inputs.load(points=tmp_path / "vggt.npz")
    options = {"edge": 10.0, "device": torch.device("cpu")}
    result = chain.run(view, 32, 3, percentile=100 * float(1 - points[1].mean()), stages=chain.Stages(), **options)
    assert torch.equal(result.mask, torch.from_numpy(points[1]).expand(2, -1, -1))


def test_plain_arrays_and_coordinate_maps(tmp_path, points):
    np.save(tmp_path / "map.npy", points[0])
    np.testing.assert_array_equal(inputs.load(points=tmp_path / "map.npy").points[0].numpy(), points[0])
    rgba = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 255, np.where(points[1], 255, 0)
    Image.fromarray(rgba).save(tmp_path / "canonical.png")
    view = inputs.load(points=tmp_path / "canonical.png")
    assert view.points[0, 0, 0].tolist() == [1, -1, -1]
    np.testing.assert_array_equal(view.mask[0].numpy(), points[1])


def test_intrinsics_of_a_depth_file(tmp_path):
    for name, scale in (("pixels", np.array([[WIDTH], [HEIGHT], [1.0]])), ("normalised", np.ones((3, 1)))):
        K = np.array([[1.2, 0, 0.5], [0, 1.6, 0.5], [0, 0, 1]]) * scale
        np.savez(tmp_path / f"{name}.npz", depth=np.ones((HEIGHT, WIDTH)), intrinsics=K)
        view = inputs.load(depth=tmp_path / f"{name}.npz")
        np.testing.assert_allclose(view.intrinsics.numpy()[0], [1.2 * WIDTH, 0, WIDTH / 2], rtol=1e-6)


def test_a_file_may_hold_more_than_arrays_and_more_than_float32_holds(tmp_path, points):
    np.savez(tmp_path / "more.npz", points=points[0], images=np.full((HEIGHT, WIDTH, 3), np.nan, np.float32))
    with zipfile.ZipFile(tmp_path / "more.npz", "a") as archive:
        archive.writestr("notes.txt", "taken in May")
    view = inputs.load(points=tmp_path / "more.npz")
    np.testing.assert_array_equal(view.points[0].numpy(), points[0])
    assert not view.image.any()
    far = points[0].astype(np.float64)
    far[0, 0] = 1e200
    np.save(tmp_path / "far.npy", far)
    assert inputs.load(points=tmp_path / "far.npy").points[0, 0, 0].isinf().all()  # invalid, as any infinity


def _text(path):
    path.write_text("no image")


def _damaged(path, **changes):
    """A compressed archive, cut short or with bytes overwritten."""
    np.savez_compressed(path, points=np.random.default_rng(0).normal(size=(9, 8, 3)))
    data = bytearray(path.read_bytes())
    if "keep" in changes:
        data = data[: changes["keep"]]
    else:
        data[100:200] = b"U" * 100
    path.write_bytes(data)


BAD_FILES = {
    "nothing.npz": (None, "there is no such file"),
    "points.obj": (_text, r"expected one of \.npz, \.npy, \.png, got \.obj"),
    "text.npz": (_text, "expected NumPy arrays without pickled objects"),
    "text.png": (_text, "expected an image"),
    "cut.npz": (lambda p: _damaged(p, keep=500), "expected NumPy arrays .* not a zip file"),
    "damaged.npz": (_damaged, "expected NumPy arrays .* decompressing"),
    "flat.npy": (lambda p: np.save(p, np.zeros((5, 4))), r"of shape \[\.\.\., H, W, 3\], got \[5, 4\]"),
    "four.npy": (lambda p: np.save(p, np.zeros((5, 4, 4))), r"got \[5, 4, 4\]"),
    "words.npy": (lambda p: np.save(p, np.array([["a"]])), "expected numbers"),
    "pickle.npy": (lambda p: np.save(p, np.array([{}], dtype=object)), "without pickled objects"),
    "keys.npz": (lambda p: np.savez(p, xyz=np.zeros(3)), r"expected VGGT's world_points .* got xyz \[3\]"),
    "empty.npz": (lambda p: np.savez(p), "got an empty file"),
    "mask.npz": (
        lambda p: np.savez(p, points=np.zeros((5, 4, 3)), mask=np.ones((4, 5), bool)),
        "expected mask 1 × 5 × 4 like the points, got 1 × 4 × 5",
    ),
    "pair.npz": (
        lambda p: np.savez(p, pts3d_1=np.zeros((5, 4, 3)), pts3d_2=np.zeros((5, 4, 3)), conf_1=np.zeros((5, 4))),
        "expected a conf array for each pts3d array",
    ),
    "sizes.npz": (
        lambda p: np.savez(p, pts3d_1=np.zeros((5, 4, 3)), pts3d_2=np.zeros((6, 4, 3))),
        "expected maps of one size, got 5 × 4, 6 × 4",
    ),
    "image.npz": (
        lambda p: np.savez(p, points=np.zeros((5, 4, 3)), images=np.zeros((7, 4, 3))),
        "expected an image for each map, 1 × 5 × 4, got 1 × 7 × 4",
    ),
    "nan.npz": (lambda p: np.savez(p, points=np.full((5, 4, 3), np.nan)), "nothing is left to mesh"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_point_files_are_named(name, tmp_path, capsys):
    make, complaint = BAD_FILES[name]
    if make is not None:
        make(tmp_path / name)
    status, out = run(tmp_path, "--points", tmp_path / name)
    assert status == 2 and not out.exists()
    error = capsys.readouterr().err
    assert error.startswith("cvctoolkit demo: ") and len(error.splitlines()) == 1
    assert re.search(complaint, error)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--depth", "a.png", "--points", "b.npz"], "not both"),
        (["--image", "a.png"], "give --depth or --points with it"),
        (["--device", "tpu"], "expected cpu or cuda, got 'tpu'"),
        (["--depth", "DEPTH", "--fov", "200"], "expected degrees between 0 and 180, got 200"),
        (["--depth", "DEPTH", "--band", "40"], "a band of 40 voxels does not fit a grid of 48"),
        (["--depth", "COLOUR"], "expected a PNG with one channel of integers"),
        (["--depth", "DEPTH", "--resolution", "0"], "--resolution: expected 1 to 65536, got 0"),
        (["--depth", "DEPTH", "--resolution", "65537"], "--resolution: expected 1 to 65536, got 65537"),
        (["--depth", "DEPTH", "--edge", "-1"], "--edge: expected 0 to inf, got -1"),
        (["--depth", "DEPTH", "--edge", "nan"], "--edge: expected 0 to inf, got nan"),
        (["--depth", "DEPTH", "--percentile", "101"], "--percentile: expected 0 to 100, got 101"),
        (["--depth", "DEPTH", "--band", "nan"], "band must be finite"),
        (["--depth", "DEPTH", "--out", "DEPTH"], "File exists"),
        (["--depth", "MATRIX"], "expected intrinsics [..., 3, 3], got [4, 4]"),
    ],
)
def test_bad_options_are_named(arguments, complaint, tmp_path, capsys):
    Image.fromarray(np.full((HEIGHT, WIDTH), 2000, np.uint16)).save(tmp_path / "depth.png")
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "colour.png")
    np.savez(tmp_path / "matrix.npz", depth=np.ones((HEIGHT, WIDTH)), intrinsics=np.eye(4))
    names = {"DEPTH": "depth.png", "COLOUR": "colour.png", "MATRIX": "matrix.npz"}
    files = {name: str(tmp_path / file) for name, file in names.items()}
    common = ["--out", str(tmp_path / "out"), "--resolution", "48", "--band", "3"]
    assert demo.main([*common, *(files.get(a, a) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert complaint in error and len(error.splitlines()) == 1
