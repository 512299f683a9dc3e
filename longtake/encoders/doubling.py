"""Nearest-neighbour doubling of pictures and the convolution after it as one convolution of the small pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.encoders.past import wide


def folded(weight: Tensor) -> Tensor:
    """The 2x2 convolution [4 O, C, 2, 2] that stands for doubling a picture and then convolving it with [O, C, 3, 3].

    Of the three rows that an even row of the doubled picture reads, the last two are one row of the small picture; of
    an odd row, the first two. So both read two rows: the one before and its own, or its own and the next. Columns
    alike: four kernels of 2x2, by the parity of row and column, do what nine taps did. Sums are taken in float32 or
    float64.
    """

    def by_parity(weight: Tensor, dim: int) -> Tensor:
        before, middle, after = weight.unbind(dim)
        return torch.stack([torch.stack([before, middle + after], dim), torch.stack([before + middle, after], dim)])

    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    small = by_parity(by_parity(exact, 3), 3)  # [2, 2, O, C, 2, 2]: columns first, so that rows stand first
    return small.flatten(0, 2).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def doubled(x: Tensor, weight: Tensor, grown: int = 1) -> Tensor:
    """[B, T grown, 2 H, 2 W, O] of [B, T, H, W, C] and a weight of `folded`, without bias.

    Args: `grown`, how many frames each becomes: the weight that was folded is [grown O, C, 3, 3], a frame's outputs
    after those of the one before.
    """
    batch, time, height, width, _ = x.shape
    # With a border of one pixel, place (i, j) has read rows i - 1 and i: for even rows the result of row i, for odd
    # ones that of row i - 1.
    y = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight, None, (1, 1), (1, 1)).permute(0, 2, 3, 1).contiguous()
    images, rows, columns, four = y.shape
    line, each, out = columns * four, four // 4, four // (4 * grown)
    shape = (images, grown, height, 2, width, 2, out)
    places = y.as_strided(shape, (rows * line, out, line, line + 2 * each, four, four + each, 1))
    return wide(places).contiguous().view(y.dtype).view(batch, time * grown, 2 * height, 2 * width, out)
