"""Every random number of training as a function of (seed, step, purpose, global sample index).

Nothing here has a state that runs on, so the numbers do not depend on the number of ranks, on how a batch is split,
or on where a run was resumed. All numbers are drawn on the CPU, hence equal on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

_SHARED = -1  # the "sample index" of draws that all samples and ranks share
_WORTH = 1 << 16  # numbers of a draw that a thread makes ahead: 0.6 ms


class KeyedRNG:
    """Random numbers of one seed.

    `step` counts iterations, `purpose` names what is drawn ("noise", "sigma", "exit_step", ...), `index` is the global
    sample index, `part` tells draws of one purpose apart (a block, a denoising step, or a hash of both). With `ahead`,
    a thread makes the noise of the next step while a GPU computes this one; the numbers are the same.
    """

    def __init__(self, seed: int, *, ahead: bool = False) -> None:
        self.seed, self._ahead = seed, Ahead() if ahead else None

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

        def make(step: int, indices: Sequence[int]) -> Tensor:
            rows = [torch.randn(tuple(shape), generator=self.generator(step, purpose, i, part)) for i in indices]
            return torch.stack(rows)

        if self._ahead is None or len(indices) * math.prod(shape) < _WORTH:
            return to_device(make(step, indices), device)
        return to_device(self._ahead.made((purpose, tuple(shape), part), step, indices, make), device)

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


class Ahead:
    """What the next step is expected to draw, made in a thread.

    Expected is a draw that came in the step before, too, of samples that go on by as many each step. What is drawn
    otherwise is made when it is asked for: a wrong guess costs a thread's time and changes no number.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "noise")
        self._seen: dict[object, tuple[int, list[int]]] = {}  # by kind of draw: step and samples of the last one
        self._next: dict[object, tuple[int, list[int], Future[Tensor]]] = {}

    def made(
        self, kind: object, step: int, indices: Sequence[int], make: Callable[[int, Sequence[int]], Tensor]
    ) -> Tensor:
        """`make(step, indices)`, and the next one of its `kind` begins. Raises: what `make` raises."""
        asked = list(indices)
        expected = self._next.get(kind)
        right = expected is not None and expected[:2] == (step, asked)
        before = self._seen.get(kind)
        if before is None or before[0] != step:  # else a micro-batch, or the other network, of the same step
            self._seen[kind] = (step, asked)
            self._expect(kind, before, make)
        return expected[2].result() if expected is not None and right else make(step, asked)

    def _expect(
        self, kind: object, before: tuple[int, list[int]] | None, make: Callable[[int, Sequence[int]], Tensor]
    ) -> None:
        step, indices = self._seen[kind]
        for other in [other for other, (last, _) in self._seen.items() if last < step - 1]:
            self._seen.pop(other)  # parts that do not come again must not add up
            self._next.pop(other, None)
        if before is None or before[0] != step - 1 or len(before[1]) != len(indices):
            return
        going_on = [2 * now - then for now, then in zip(indices, before[1])]
        self._next[kind] = (step + 1, going_on, self._thread.submit(make, step + 1, going_on))


def to_device(made: Tensor, device: torch.device | str) -> Tensor:
    """What was made on the CPU, on `device`, without waiting for it."""
    if torch.device(device).type != "cuda":
        return made.to(device)
    # From memory that is not pinned the copy would wait for all that the GPU has been given to do.
    return made.pin_memory().to(device, non_blocking=True)
