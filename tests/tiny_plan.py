"""Plans of the tests: everything but the size of a block may be left out, and then nothing is ever evicted."""

from typing import Any

from longtake.condition import MaskLayout
from longtake.plan import StreamPlan, packed_layout


def tiny_plan(
    block: int = 2, first: int = 1, window: int | None = None, sink: int = 0, rope: str = "relative", **rules: Any
) -> StreamPlan:
    """A plan by its numbers in the order in which they are mostly given."""
    given: dict[str, Any] = {"window_frames": window, "sink_frames": sink, "rope": rope, **rules}
    return StreamPlan(block_frames=block, first_frames=first, **given)


def causal_layout(plan: StreamPlan, num_frames: int) -> MaskLayout:
    """Layout of one pass over frames of which each block sees itself and its past: what calls against a cache are."""
    plan.check(num_frames)
    calls = []
    for start, end in plan.blocks(0, num_frames):
        plan.check_fits(start, end)
        calls.append((range(start, end), plan.attended(start, end)))
    return packed_layout(list(range(num_frames)), calls, plan.rope, stored=(True,) * num_frames)
