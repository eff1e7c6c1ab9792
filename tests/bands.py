"""What tests of narrow bands share."""

import hypothesis.strategies as st
import pytest
import torch

from cvctoolkit.ops.mesh import reference as mesh_reference
from cvctoolkit.ops.sdf.reference import voxel_centers

BACKENDS = ["native", "reference"]
ISAS = ["baseline", "avx2", "avx512"]


def generator(seed):
    return torch.Generator().manual_seed(seed)


any_width = pytest.mark.filterwarnings("ignore:narrow_band_udf. a band:UserWarning")


def brute_force(vertices, faces, resolution, band, bounds=(-1.0, 1.0)):
    """Every voxel against every face, in float64."""
    axes = [torch.zeros(1).long(), *[torch.arange(resolution)] * 3]
    coords = torch.cartesian_prod(*axes).int()
    points = voxel_centers(coords, resolution, *bounds)
    udf, face, _ = mesh_reference.closest_point_on_mesh(points, vertices.double(), faces)
    near = udf < band * (bounds[1] - bounds[0]) / resolution
    return coords[near], udf[near], face[near]


def scattered(seed, faces, log_size, spread):
    """Triangles of sizes from a point's to many times the grid's, in places from its middle to far outside."""
    g = generator(seed)
    at = torch.randn(faces, 1, 3, generator=g, dtype=torch.float64) * spread
    size = 10 ** (log_size + torch.rand(faces, 1, 1, generator=g, dtype=torch.float64) * 2 - 1)
    corners = at + size * torch.randn(faces, 3, 3, generator=g, dtype=torch.float64)
    if faces > 2:
        corners[0, 1] = corners[0, 0]
        corners[1, 2] = (corners[1, 0] + corners[1, 1]) / 2
        corners[2] = corners[-1]
    return dict(vertices=corners.reshape(-1, 3), faces=torch.arange(3 * faces).reshape(faces, 3))


soups = st.builds(
    scattered,
    st.integers(0, 2**16),
    st.integers(1, 12),
    st.sampled_from([-6, -2, -1, 0, 1, 3]),
    st.sampled_from([0.3, 1.0, 3.0]),
)
TRIANGLE = dict(vertices=torch.eye(3), faces=torch.tensor([[0, 1, 2]]), resolution=8, band=2.0)
