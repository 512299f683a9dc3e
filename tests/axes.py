"""Products of parameters of which every pair of values stays in the fast set, and the rest is slow."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*axes: Iterable[Any]) -> list[Any]:
    """All combinations; those are fast that show a pair of values which none before them shows. Tuples are flattened."""
    numbered = [list(axis) for axis in axes]
    seen: set[tuple[tuple[int, int], ...]] = set()
    found = []
    # Diagonals first: neighbours differ in every value, so that few are needed.
    places = sorted(product(*(range(len(axis)) for axis in numbered)), key=lambda at: (_turn(at, numbered), at))
    for at in places:
        pairs = set(combinations(enumerate(at), 2))
        values = [axis[k] for axis, k in zip(numbered, at, strict=True)]
        flat = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        found.append(pytest.param(*flat, marks=[] if pairs - seen else [pytest.mark.slow]))
        seen |= pairs
    return found


def _turn(at: tuple[int, ...], axes: list[list[Any]]) -> int:
    """How far the last values lie from the sum of those before, around their axis."""
    return (sum(at[:-1]) - at[-1]) % len(axes[-1])
