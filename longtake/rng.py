"""Every random number of training as a function of (seed, step, purpose, global sample index).

Nothing here has a state that runs on, so the numbers do not depend on the number of ranks, on how a batch is split,
or on where a run was resumed. All numbers are drawn on the CPU, hence equal on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_SHARED = -1  # the "sample index" of draws that all samples and ranks share


class KeyedRNG:
    """Random numbers of one seed.

    `step` counts iterations, `purpose` names what is drawn ("noise", "sigma", "exit_step", ...), `index` is the global
    sample index, `part` tells draws of one purpose apart (a block, a denoising step, or a hash of both).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generator(self, step: int, purpose: str, index: int, part: int = 0) -> torch.Generator:
        """A fresh CPU generator, always the same for the same arguments."""
        key = f"{self.seed}|{step}|{purpose}|{index}|{part}".encode()
        # blake2b rather than hash(): the same in every process and Python version. 63 bits are valid for any generator.
        state = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
        return torch.Generator().manual_seed(state)

    def noise(
        self,
        step: int,
        purpose: str,
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        part: int = 0,
    ) -> Tensor:
        """Standard normal numbers, float32 [B, *shape], one row for each global sample index."""
        rows = [torch.randn(tuple(shape), generator=self.generator(step, purpose, i, part)) for i in indices]
        return to_device(torch.stack(rows), device)

    def uniform(
        self,
        step: int,
        purpose: str,
        indices: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        part: int = 0,
    ) -> Tensor:
        """Uniform numbers [B] in [0, 1), one for each global sample index."""
        rows = [torch.rand((), generator=self.generator(step, purpose, i, part), dtype=torch.float64) for i in indices]
        return to_device(torch.stack(rows).to(dtype), device)

    def integer(self, step: int, purpose: str, low: int, high: int, part: int = 0) -> int:
        """One integer in [low, high), shared by all samples and equal on all ranks."""
        return int(torch.randint(low, high, (), generator=self.generator(step, purpose, _SHARED, part)))


def to_device(made: Tensor, device: torch.device | str) -> Tensor:
    """What was made on the CPU, on `device`, without waiting for it."""
    if torch.device(device).type != "cuda":
        return made.to(device)
    # From memory that is not pinned the copy would wait for all that the GPU has been given to do.
    return made.pin_memory().to(device, non_blocking=True)
