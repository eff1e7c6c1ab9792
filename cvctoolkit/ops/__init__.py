"""Every operator, flat: ``from cvctoolkit.ops import pointmap_to_mesh``.

Each family is a package of its own (``cvctoolkit.ops.pointmap``) with its equations in README.md, its specification in
reference.py and its public functions in op.py.
"""

from cvctoolkit.ops import (
    cameras,
    distillation,
    epipolar,
    flow,
    matching,
    mesh,
    pointmap,
    sdf,
    sparse_attention,
    sparse_conv,
    voxels,
)
from cvctoolkit.ops.cameras import *  # noqa: F403
from cvctoolkit.ops.distillation import *  # noqa: F403
from cvctoolkit.ops.epipolar import *  # noqa: F403
from cvctoolkit.ops.flow import *  # noqa: F403
from cvctoolkit.ops.matching import *  # noqa: F403
from cvctoolkit.ops.mesh import *  # noqa: F403
from cvctoolkit.ops.pointmap import *  # noqa: F403
from cvctoolkit.ops.sdf import *  # noqa: F403
from cvctoolkit.ops.sparse_attention import *  # noqa: F403
from cvctoolkit.ops.sparse_conv import *  # noqa: F403
from cvctoolkit.ops.voxels import *  # noqa: F403

#: The families, in the order in which data runs through them.
FAMILIES = (cameras, epipolar, pointmap, mesh, sdf, voxels, sparse_conv, sparse_attention, distillation, flow, matching)

__all__: list[str] = []
__all__ += cameras.__all__
__all__ += epipolar.__all__
__all__ += pointmap.__all__
__all__ += mesh.__all__
__all__ += sdf.__all__
__all__ += voxels.__all__
__all__ += sparse_conv.__all__
__all__ += sparse_attention.__all__
__all__ += distillation.__all__
__all__ += flow.__all__
__all__ += matching.__all__
