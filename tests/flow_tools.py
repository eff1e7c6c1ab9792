"""What tests of flow steps share."""

import hypothesis.strategies as st
import torch

from cvctoolkit.ops.flow import samples as flow_samples
from cvctoolkit.ops.flow.op import MODES

BACKENDS = ["native", "reference"]
backends = st.sampled_from(BACKENDS)
modes = st.sampled_from(MODES)
seeds = st.integers(0, 2**16)
levels = st.tuples(st.floats(0.05, 1.0), st.floats(0.0, 1.0))


def draw(seed, *shape, count=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def sparse(seed, rows=13, targets=6, channels=3, dtype=torch.float64):
    x, cond, uncond, noise = draw(seed, rows, channels, dtype=dtype)
    (target,) = draw(seed + 1, targets, channels, count=1, dtype=dtype)
    return x, cond, uncond, noise, target, flow_samples.index_map(torch.Generator().manual_seed(seed), rows, targets)


def drift(x, t, sign=1.0):
    """A velocity field with some structure, smooth in x and t."""
    return sign * (torch.sin(3 * x) + 0.1 * x * (t / 1000) + 0.3)
