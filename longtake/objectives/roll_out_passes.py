"""The calls that a roll-out makes of the student, as they are counted. They are those of `rollout/self_forcing.py`,
which a test holds against torch's own counter of operations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from longtake.models.flops import Call
from longtake.objectives.base import Pass
from longtake.plan import Exits, StreamPlan

if TYPE_CHECKING:
    from longtake.rollout.denoise import Denoiser


def roll_out_passes(
    plan: StreamPlan, student: Denoiser, clip: Call, frames: tuple[int, int], exits: Exits, *, with_grad: bool
) -> list[Pass]:
    """Denoising and context passes; only the first call without gradient makes keys and values of the text.

    Args: `clip`, all frames in one bidirectional call; first and last (exclusive) of the `frames` that are generated;
    where blocks stop (`exits`).
    """
    start, end = frames
    together, replays = with_grad and student.batched_exit_backward, with_grad and student.replays
    apart = with_grad and not together and not replays

    def one(block: tuple[int, int], *, with_context: bool) -> Call:
        return clip.cached(block[1] - block[0], len(plan.attended(*block)), with_context=with_context)

    def stops(block: tuple[int, int]) -> int:
        return plan.exit_step(block[0], exits)

    def is_stored(block: tuple[int, int]) -> bool:
        """Whether its last step, without gradient, stores it."""
        return plan.stores_itself(block[0]) and stops(block) == len(plan.levels(block[0])) - 1 and not apart

    denoised = list(plan.blocks(start, end))
    # The block before is committed first: the picture, or what an earlier roll-out left.
    committed = [plan.block_of(start - 1)] if start else []
    committed += [block for block in denoised[:-1] if not is_stored(block)]
    found = [Pass("generator", "rollout", one(block, with_context=k == 0)) for k, block in enumerate(committed)]
    for k, block in enumerate(denoised):
        call = one(block, with_context=False)
        fresh = apart or (k == 0 and not committed)
        found.append(Pass("generator", "rollout", call, times=stops(block)))
        found.append(Pass("generator", "rollout", replace(call, with_context=fresh), with_grad=apart))
    if together:
        joined = Call.joined([one(block, with_context=True) for block in denoised])
        found.append(Pass("generator", "rollout", joined, with_grad=True, ahead=False))
    if replays:
        layout = plan.replay_layout(plan.block_of(start - 1)[0] if start else 0, start, end)
        found.append(Pass("generator", "rollout", clip.masked(layout), with_grad=True))
    return found
