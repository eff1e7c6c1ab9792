"""What tests of score distillation share."""

import torch

from cvctoolkit.ops.distillation.samples import alphas_cumprod

BACKENDS = ["native", "reference"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TABLE = alphas_cumprod(1000)


def randn(*shape, seed=0, count=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]
    return made if count > 1 else made[0]


def times(batch, seed=0, last=999):
    return torch.randint(1, last, (batch,), generator=torch.Generator().manual_seed(seed))


def views(values, like):
    return values.double().view(-1, *[1] * (like.dim() - 1))


def gradient(loss, x, upstream=1.0):
    return torch.autograd.grad(loss * upstream, x)[0]
