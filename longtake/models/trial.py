"""Kernels of our own, and those of others, are tried on small problems before they are used on a device."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable

import torch

logger = logging.getLogger(__name__)


def is_right(what: str, device: torch.device, off: Callable[[], Iterable[float]], most: float = 1e-2) -> bool:
    """Whether `what` runs on a device and its results are `off` by no more than that, each beside its size; says once
    why not, where its result is kept: torch's operations take its place.
    """
    try:
        found = list(off())
    except (RuntimeError, AssertionError, ValueError, TypeError, _of_compiler()) as error:
        logger.warning("%s failed on %s and is not used: %s", what, device, str(error).strip().splitlines()[:1])
        return False
    if all(one <= most for one in found):  # false of what is no number
        return True
    logger.warning("%s is off by %s on %s and is not used", what, ", ".join(f"{one:.1e}" for one in found), device)
    return False


def beside(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The size of the difference beside that of the truth."""
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).norm() / truth.norm())


def _of_compiler() -> type[Exception]:
    """Errors of triton, where it is used; they have a class of their own, not in every version."""
    return getattr(sys.modules.get("triton"), "TritonError", RuntimeError)
