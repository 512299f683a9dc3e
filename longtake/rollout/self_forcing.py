"""The student's own roll-out over a training horizon: what it will do at inference, with gradient where it is wanted.

Source: Self-Forcing (arXiv 2506.08009); specification F and its I2V rules: the given picture is frame 0, cached at
sigma 0, never generated; the context pass of the last block is left out, since nobody reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.condition import Condition
from longtake.flow.path import add_noise
from longtake.plan import Exits, StreamPlan
from longtake.rollout.denoise import Denoiser, commit_block, denoise_block
from longtake.rollout.replay import ExitStep, Replay

# noise(start frame, end frame, step) -> [B, end - start, C, H, W]
RollOutNoise = Callable[[int, int, int], Tensor]


@dataclass(frozen=True)
class RollOut:
    """`latents` [B, F, C, H, W], generated from frame `begin` on: before it are given pictures, or what is past."""

    latents: Tensor
    begin: int

    @property
    def generated(self) -> Tensor:
        """[F] boolean. As an index it would be waited for; frames are cut by `begin`."""
        return torch.arange(self.latents.shape[1], device=self.latents.device) >= self.begin


def roll_out(
    denoiser: Denoiser,
    condition: Condition,
    first_latent: Tensor | None,
    noise: RollOutNoise,
    plan: StreamPlan,
    num_frames: int,
    latent_size: tuple[int, int],
    *,
    exit_step: Exits | None = None,
    with_grad: bool = False,
) -> RollOut:
    """Unrolls `num_frames` latent frames block by block from an empty cache.

    What enters the cache follows the plan (`denoise_block`): where it stores a block by its last denoising step and the
    block stops earlier, it is the block's clean latents, noised to the level of that step.
    Args: `first_latent` [B, 1, C, H, W] the given picture (frame 0) or None; `noise` by absolute frames and denoising
    step; `exit_step` as in `StreamPlan`; `with_grad`: the graph of exit steps; of context too, if denoiser `replays`.
    Raises: ConfigError when `num_frames` does not fit the block plan.
    """
    plan.check(num_frames)
    plan = plan.with_given(0 if first_latent is None else first_latent.shape[1])
    # Recomputation in backward reads the context again, so nothing may be evicted before it; a replay makes it anew.
    # The last block is never stored.
    evicted = 0 if plan.window_frames is None else max(0, plan.block_of(num_frames - 1)[0] - plan.window_frames)
    reread = denoiser.rereads and not denoiser.replays and (with_grad or denoiser.graphs is not None)  # one for both
    cache = denoiser.pooled_cache(plan, condition.batch_size, latent_size, num_frames, evicted if reread else 0)
    blocks: list[Tensor] = [] if first_latent is None else [first_latent.float()]
    exits: list[ExitStep] | None = [] if with_grad and denoiser.batched_exit_backward else None
    replay = Replay(plan, cache) if with_grad and denoiser.replays else None
    with denoiser.gathered():
        if first_latent is not None:
            commit_block(denoiser, cache, condition, first_latent)
            if replay is not None:
                replay.stored(first_latent, 0.0)
        for start, end in plan.blocks(cache.position, num_frames):
            made = denoise_block(
                denoiser,
                cache,
                condition,
                block_noise_at(noise, start, end),
                plan,
                exit_step=exit_step,
                with_grad=with_grad and replay is None,
                exits=exits,
                stores=end < num_frames,
            )
            blocks.append(made.clean)
            if end < num_frames and not made.stored:
                commit_block(denoiser, cache, condition, made.context, made.sigma)
            if replay is not None:
                replay.left(start, made.noisy, made.noisy_sigma)
                if end < num_frames:
                    replay.stored(made.context, made.sigma)
        if exits:
            blocks[-len(exits) :] = [denoiser.exits_with_grad(condition, exits)]
        if replay is not None:
            blocks[-replay.num_exits :] = [denoiser.replayed(condition, replay)]
    return RollOut(torch.cat(blocks, 1), plan.given_frames)


@torch.no_grad()
def recycle(
    denoiser: Denoiser,
    condition: Condition,
    clean: Tensor,
    noise: RollOutNoise,
    plan: StreamPlan,
    starts: Sequence[int],
) -> Tensor:
    """The student's own version of real videos `clean` [B, F, C, H, W], float32: what its history will look like.

    Block number k is noised to the level of step `starts[k]` and denoised from there, after the own versions of the
    blocks before it; what the noise leaves of the real block keeps the two alike. The last block, which is in nobody's
    history, stays as it is, and so do the frames that are given (`plan.given_frames`). Args: `noise` as in `roll_out`.
    Source: the thought is that of error recycling (Stable Video Infinity, arXiv 2510.09212).
    """
    made = clean.float().clone()
    batch, frames, _, height, width = made.shape
    cache = denoiser.pooled_cache(plan, batch, (height, width), frames)
    with denoiser.gathered():
        for part, (start, end) in enumerate(plan.blocks(0, frames)):
            if end == frames:
                break
            if start < plan.given_frames:
                commit_block(denoiser, cache, condition, made[:, start:end])
                continue
            first, drawn = starts[part], block_noise_at(noise, start, end)
            level = torch.full((batch,), plan.levels(start)[first], device=made.device)
            begin = first, add_noise(made[:, start:end], drawn(first), level)
            block = denoise_block(denoiser, cache, condition, drawn, plan, begin=begin)
            made[:, start:end] = block.clean
            if not block.stored:
                commit_block(denoiser, cache, condition, block.context, block.sigma)
    return made


def block_noise_at(noise: RollOutNoise, start: int, end: int) -> Callable[[int], Tensor]:
    """Noise of one block as a function of the denoising step alone."""
    return lambda step: noise(start, end, step)
