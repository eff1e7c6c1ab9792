"""Any combination of arguments gives a valid result, a ValueError or a TypeError: never a crash, a hang or garbage."""

import inspect

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from cvctoolkit import ops
from cvctoolkit.testing import tensors

nan, inf = float("nan"), float("inf")


class Pool:
    """Values that an operator has an answer for, and all sorts of others."""

    def __init__(self, *good, odd=()):
        self.good, self.any = st.sampled_from(good), st.sampled_from([*good, *odd])


def _points(n, dtype=torch.float32, scale=1.0, seed=0):
    values = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * scale - 0.5).to(dtype)


def _with(value, tensor):
    tensor = tensor.clone()
    tensor.view(-1)[tensor.numel() // 2] = value
    return tensor


_SIX, _FACES = _points(6), torch.tensor([[0, 1, 2], [2, 3, 4], [3, 4, 5], [0, 5, 1]])
_MAP = _points(30).view(5, 6, 3)
_DEPTH = _MAP[..., 0] + 2
_MASK = torch.ones(5, 6, dtype=torch.bool)
_HOLED = torch.eye(6, dtype=torch.bool)[:5] == 0
_COORDS = torch.cartesian_prod(torch.arange(1), torch.arange(3), torch.arange(3), torch.arange(3)).int()
_SDF = torch.rand(27, generator=torch.Generator().manual_seed(1)) * 2 - 1
_NO_TENSOR = (None, "x", [[0.0, 0.0, 0.0]])

VERTICES = Pool(
    _SIX, _points(6, scale=1e-20), _points(6, scale=40), torch.zeros(6, 3), _points(12)[::2],
    odd=(
        _points(6, torch.float64), _points(6, torch.float16), _points(6, scale=1e30), _points(0), _with(nan, _SIX),
        _with(inf, _SIX), _SIX.expand(2, 6, 3), _SIX.long(), torch.zeros(6, 2), _SIX.to_sparse(), *_NO_TENSOR,
    ),
)  # fmt: skip
QUERIES = Pool(
    _SIX, _points(9, scale=3), _points(6)[:, [1, 2, 0]], odd=(_SIX.expand(2, 6, 3), _points(0), _with(nan, _SIX), None)
)
FACES = Pool(
    _FACES, _FACES.int(), _FACES.repeat(2, 1)[::2], torch.zeros(4, 3, dtype=torch.int64),
    torch.tensor([[1, 1, 2], [2, 2, 2], [0, 1, 2], [0, 1, 2]]),
    odd=(
        _FACES[:0], _with(6, _FACES), _with(-1, _FACES), _with(2**40, _FACES), _FACES.float(), _FACES[:, :2],
        _FACES.short(), *_NO_TENSOR,
    ),
)  # fmt: skip
NUMBERS = Pool(0.3, 1.0, 2.5, 4, odd=(0.0, -1.0, 1e-9, 1e30, nan, inf, None, "3", True))
FRACTIONS = Pool(0.0, 0.3, odd=(1.0, -1.0, nan, None, "3"))
RESOLUTIONS = Pool(1, 2, 5, 8, 16, 33, odd=(0, -4, 65537, 2**40, 8.0, "8", None, True))
NAMES = Pool("native", "reference", None, odd=("triton", "cuda", 7, ["native"]))
BOOLEANS = Pool(True, False, odd=(None, "yes", torch.ones(2)))
MASKS = Pool(
    None, _MASK, _HOLED, ~_MASK,
    odd=(_MASK.reshape(6, 5).T, torch.ones(5, 7, dtype=torch.bool), _MASK.float(), _MASK[:0], "m"),
)  # fmt: skip
MAPS = Pool(
    _MAP, _with(nan, _MAP), _with(-inf, _MAP), _MAP.transpose(0, 1).contiguous().transpose(0, 1),
    odd=(
        _MAP.double(), _MAP.half(), _MAP.expand(2, 5, 6, 3), _MAP.int(), _MAP[:1], _MAP[:, :1], _MAP[:0], _MAP[..., :2],
        _MAP.transpose(0, 1), *_NO_TENSOR,
    ),
)  # fmt: skip
DEPTHS = Pool(
    _DEPTH, _with(nan, _DEPTH), _DEPTH.T.contiguous().T,
    odd=(_DEPTH.double(), _DEPTH.T, _DEPTH[:0], _DEPTH[0, 0], _DEPTH.long(), *_NO_TENSOR),
)  # fmt: skip
SDF = Pool(
    _SDF, _SDF.repeat_interleave(2)[::2], torch.zeros(27),
    odd=(_SDF.double(), _SDF[:14], _SDF[:0], _with(nan, _SDF), _with(inf, _SDF), _SDF.half(), *_NO_TENSOR),
)  # fmt: skip
COORDS = Pool(
    _COORDS, _COORDS.flip(0), _COORDS.repeat(2, 1)[::2].sort(0).values,
    odd=(_COORDS[::2], _COORDS[:0], _with(-1, _COORDS), _with(70000, _COORDS), _COORDS.long(), _COORDS[:, :3], None),
)  # fmt: skip
SIZES = Pool(3, 7, odd=(0, -1, 2.0, 2**40, None))

ARGUMENTS = {
    "vertices": VERTICES, "faces": FACES, "resolution": RESOLUTIONS, "band": NUMBERS, "backend": NAMES,
    "bounds": Pool(
        (-1, 1), (-1.0, 1.0), (0, 2), odd=((1, 1), (2, -1), (nan, 1), (-inf, inf), (0,), None, 3, (-1e-30, 1e-30))
    ),
    "face_batch": Pool(
        None, torch.zeros(4, dtype=torch.int64), torch.arange(4).int(),
        odd=(torch.tensor([0, 0, -1, 0]), torch.full((4,), 40000), torch.zeros(4), torch.zeros(3, dtype=torch.int64)),
    ),
    "mask": MASKS, "depth": DEPTHS, "confidence": DEPTHS, "disparity": DEPTHS, "rtol": NUMBERS, "atol": NUMBERS,
    "kernel_size": Pool(1, 3, 5, odd=(2, 0, -1, 3.0, 301, None)),
    "winding": Pool("consistent", "paper", odd=("x", None, ["paper"])), "corner_triangles": BOOLEANS,
    "threshold": NUMBERS, "percentile": NUMBERS, "margin": FRACTIONS, "edge_rtol": NUMBERS, "edge_atol": NUMBERS,
    "coords": COORDS, "sdf": SDF, "udf": SDF, "level": Pool(0.0, 0.3, -1.0, odd=(1.0, nan, inf, None, "3", True)),
    "ambiguous": Pool("join", "separate", odd=("x", None)),
    "Ks": Pool(
        torch.eye(3), odd=(torch.eye(3).double(), torch.eye(3).expand(2, 3, 3), torch.zeros(3, 3), torch.eye(4), None)
    ),
    "viewmats": Pool(torch.eye(4), odd=(None, torch.eye(4).double(), torch.eye(4).expand(2, 4, 4), torch.eye(3), "x")),
    "camera_model": Pool("pinhole", "ortho", odd=("x", None)), "depth_type": Pool("z", "ray", odd=("x", 3)),
    "width": SIZES, "height": SIZES, "weighting": Pool("angle", "area", "uniform", odd=("x", None)),
    "points": QUERIES, "origins": QUERIES,
    "directions": Pool(_points(6, seed=3), odd=(_SIX * 0, _points(9), _SIX.double(), "x")),
    "bvh": Pool(None, odd=(torch.zeros(9, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), "x")),
    "focal": NUMBERS, "baseline": NUMBERS, "offset": NUMBERS,
    "values": Pool(_MAP, _MAP.int(), _MAP[..., :0], odd=(_MAP[:0], _MAP.expand(2, 5, 6, 3), _MAP[0, 0], None)),
    "pixel_index": Pool(
        torch.tensor([0, 29, 3]), torch.tensor([7]).int(), torch.zeros(0, dtype=torch.int64),
        odd=(torch.tensor([30]), torch.tensor([-1]), torch.zeros(2), None),
    ),
    "mesh": Pool(ops.pointmap_to_mesh(_MAP), ops.pointmap_to_mesh(_MAP[:1]), odd=(None, (1, 2, 3))),
    "index": QUERIES, "samples": Pool("center", "corner", odd=("x", None)),
    "center": Pool(torch.zeros(3), torch.ones(1, 3), odd=(_points(6), torch.zeros(2), torch.zeros(3).double(), None)),
    "scale": Pool(torch.ones(()), torch.ones(1), odd=(torch.rand(6), torch.ones(7), None)),
}  # fmt: skip


def check_band_coords(coords, resolution):
    coords = coords.long()
    assert (coords[:, 1:] >= 0).all() and (coords[:, 1:] < resolution).all()
    keys = ((coords[:, 0] * 2**16 + coords[:, 1]) * 2**16 + coords[:, 2]) * 2**16 + coords[:, 3]
    assert (keys[1:] > keys[:-1]).all(), "coordinates are not in ascending order"


def check_band(result, kwargs):
    h = (kwargs.get("bounds", (-1, 1))[1] - kwargs.get("bounds", (-1, 1))[0]) / kwargs["resolution"]
    check_band_coords(result.coords, kwargs["resolution"])
    assert (result.udf >= 0).all() and (result.udf <= kwargs["band"] * h * (1 + 1e-5)).all()
    assert (result.face_index >= 0).all() and (result.face_index < len(kwargs["faces"])).all()


def check_surface(result, kwargs):
    faces = result.faces.long()
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    _, counts = torch.unique(edges.sort(1).values, dim=0, return_counts=True)
    assert (counts == 2).all(), "the surface is not closed"


def check_nearest(result, kwargs):
    if len(kwargs["faces"]):
        assert (result.distance >= 0).all() and (result.face_index >= 0).all()
        assert (result.barycentric >= 0).all() and ((result.barycentric.sum(-1) - 1).abs() < 1e-5).all()
    else:
        assert result.distance.isinf().all() and (result.face_index == -1).all()


def check_hits(result, kwargs):
    hit = result.face_index >= 0
    assert (result.t >= 0).all() and torch.equal(hit, result.t.isfinite())
    assert (result.face_index < len(kwargs["faces"])).all()
    assert ((result.barycentric.sum(-1) - hit.float()).abs() < 1e-5).all()


def check_mesh(result, kwargs):
    points = kwargs["points"].reshape(-1, 3)
    assert torch.equal(result.vertices, points[result.pixel_index]) and result.vertices.isfinite().all()
    assert torch.equal(result.faces.unique().long(), torch.arange(len(result.vertices)))
    if kwargs.get("mask") is not None:
        assert kwargs["mask"].flatten()[result.pixel_index].all()


def check_faces(result, kwargs):
    assert kwargs["mask"].flatten()[result.flatten().long()].all()


def check_mask_of(name):
    def check(result, kwargs):
        value = kwargs[name]
        shape = value.shape[:-1] if name == "points" else value.shape
        assert result.dtype == torch.bool and result.shape == shape
        holes = ~value.isfinite().all(-1) if name == "points" else value.isnan()
        assert not result[holes].any(), "a hole is marked"

    return check


def check_normalized(result, kwargs):
    points, mask = kwargs["points"], kwargs.get("mask")
    valid = points.isfinite().all(-1) & (mask if mask is not None else True)
    reach = 1 - kwargs.get("margin", 0.05) + 4 * torch.finfo(points.dtype).eps
    assert (result.points[valid].abs() <= max(reach, 0)).all() and result.scale > 0


def check_thin(result, kwargs):
    check_band_coords(result.coords, kwargs["resolution"])
    assert (result.sdf.abs() <= 1).all() and (result.vertices.abs() <= 1).all()
    assert (result.face_index >= 0).all() and (result.face_index < len(result.faces)).all()


def check_thin_values(result, kwargs):
    assert torch.equal(result.isnan(), kwargs["udf"].isnan()) and (result.nan_to_num(0).abs() <= 1).all()


def check_tree(result, kwargs):
    same = ops.closest_point_on_mesh(kwargs["vertices"], kwargs["vertices"], kwargs["faces"], result)
    assert all(
        map(torch.equal, same, ops.closest_point_on_mesh(kwargs["vertices"], kwargs["vertices"], kwargs["faces"]))
    )


def check_gathered(result, kwargs):
    assert result.shape == (len(kwargs["pixel_index"]), kwargs["values"].shape[-1])


def check_round_trip(result, kwargs):
    options = {k: v for k, v in kwargs.items() if k not in ("index", "points")}
    back = ops.world_to_grid(result, **options) if "index" in kwargs else ops.grid_to_world(result, **options)
    given = kwargs["index"] if "index" in kwargs else kwargs["points"]
    assert back.shape == given.shape and back.dtype == given.dtype


FUNCTIONS = {
    "narrow_band_udf": check_band,
    "marching_cubes": check_surface,
    "closest_point_on_mesh": check_nearest,
    "cast_rays": check_hits,
    "build_bvh": check_tree,
    "vertex_normals": None,
    "pointmap_to_mesh": check_mesh,
    "pointmap_faces": check_faces,
    "depth_edge_mask": check_mask_of("depth"),
    "pointmap_edge_mask": check_mask_of("points"),
    "confidence_mask": check_mask_of("confidence"),
    "normalize_points": check_normalized,
    "denormalize_points": None,
    "gather_pixels": check_gathered,
    "face_batch_index": None,
    "udf_to_thin_sdf": check_thin_values,
    "thin_sdf_from_pointmap": check_thin,
    "grid_to_world": check_round_trip,
    "world_to_grid": check_round_trip,
    "unproject_depth": None,
    "project_points": None,
    "plucker_rays": None,
    "camera_rays": None,
    "disparity_to_depth": None,
}
MAP_FUNCTIONS = ("pointmap_to_mesh", "pointmap_edge_mask", "normalize_points", "thin_sdf_from_pointmap")


@pytest.mark.filterwarnings("ignore:.*too thin for a closed shell")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_arguments(name):
    function = getattr(ops, name)
    parameters = inspect.signature(function).parameters
    pools = {p: MAPS if p == "points" and name in MAP_FUNCTIONS else ARGUMENTS[p] for p in parameters}
    required = {p for p, v in parameters.items() if v.default is inspect.Parameter.empty}
    answers = 0

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sets(st.sampled_from(sorted(parameters)), max_size=3), st.data())
    def attempt(spoiled, data):
        nonlocal answers
        chosen = {p: pools[p].any if p in spoiled else pools[p].good for p in parameters}
        kwargs = data.draw(
            st.fixed_dictionaries(
                {p: s for p, s in chosen.items() if p in required},
                optional={p: s for p, s in chosen.items() if p not in required},
            )
        )
        try:
            result = function(**kwargs)
        except (ValueError, TypeError) as error:
            named = (name, "narrow_band_udf") if name == "thin_sdf_from_pointmap" else (name,)
            assert str(error).startswith(tuple(f"{n}: " for n in named)), "an error that does not name its operator"
            return
        answers += 1
        assert tensors(result), "a result without tensors"
        if FUNCTIONS[name] is not None:
            FUNCTIONS[name](result, kwargs)

    attempt()
    assert answers >= 15, "mostly errors: the answers are hardly tried"
