"""spconv's CPU build: its pairs of rows, and its submanifold convolution over pairs that were found before.

With two threads some rows of its convolution differ from run to run (two threads add to one row), and its backward
needs CUDA: the forward on one thread is what can be compared.
"""

from __future__ import annotations

import spconv.pytorch as spconv
import torch
from spconv.pytorch import ops as spconv_ops
from torch import Tensor


class Pairs:
    """A submanifold geometry: coords ``[N, 4]`` int32, kernel 3."""

    def __init__(self, coords: Tensor) -> None:
        self.coords, self.shape = coords, [int(size) + 1 for size in coords[:, 1:].amax(0)]

    def find(self) -> tuple[Tensor, Tensor]:
        """Pairs ``[2, 27, N]`` of (input, output) rows, and how many there are of every offset."""
        three, one = [3, 3, 3], [1, 1, 1]
        algorithm = spconv_ops.ConvAlgo.Native
        _, pairs, counts = spconv_ops.get_indice_pairs(
            self.coords, 1, self.shape, algorithm, three, one, one, one, [0, 0, 0], True
        )
        return pairs, counts

    def convolution(self, weight: Tensor, feats: Tensor):
        """A function without arguments: the convolution by a weight ``[C_out, C_in, 3, 3, 3]``, on one thread."""
        conv = spconv.SubMConv3d(weight.shape[1], weight.shape[0], 3, bias=False, indice_key="map")
        conv.weight = torch.nn.Parameter(weight.permute(0, 2, 3, 4, 1).contiguous(), requires_grad=False)
        found = conv(spconv.SparseConvTensor(feats, self.coords, self.shape, 1)).indice_dict

        def run() -> tuple[Tensor]:
            x = spconv.SparseConvTensor(feats, self.coords, self.shape, 1)
            x.indice_dict = found
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return (conv(x).features,)
            finally:
                torch.set_num_threads(threads)

        return run


def to_map(pairs: Tensor, counts: Tensor) -> Tensor:
    """``[N, 27]``: of a submanifold convolution spconv lists half of the offsets, the others mirror them."""
    map = torch.full(pairs.shape[:0:-1], -1, dtype=torch.int32)
    map[:, 13] = torch.arange(len(map), dtype=torch.int32)
    for k in range(13):
        source, out = pairs[:, k, : int(counts[k])].long()
        map[out, k] = source.int()
        map[source, 26 - k] = out.int()
    return map
