"""Plans of the tests: everything but the size of a block may be left out, and then nothing is ever evicted."""

from typing import Any

from longtake.plan import StreamPlan


def tiny_plan(
    block: int = 2, first: int = 1, window: int | None = None, sink: int = 0, rope: str = "relative", **rules: Any
) -> StreamPlan:
    """A plan by its numbers in the order in which they are mostly given."""
    given: dict[str, Any] = {"window_frames": window, "sink_frames": sink, "rope": rope, **rules}
    return StreamPlan(block_frames=block, first_frames=first, **given)
