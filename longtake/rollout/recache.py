"""What a stream keeps of its own past, and the cache made anew from it when the condition changes in mid-stream.

Keys and values depend on the prompt and the picture, so after a change the cache is rebuilt under the new condition:
block by block in causal order at absolute positions, exactly as a stream would have filled it, by one policy for
inference, roll-outs and teacher forcing (`forced`). Source: specification H.5 and its rule (LongLive, arXiv 2509.22622,
rebuilds in one pass in which all frames see each other, and leaves the sink empty in training).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.condition import Condition, MaskLayout
from longtake.flow.path import add_noise
from longtake.models.cache import KVCache
from longtake.plan import Call, StreamPlan, packed_layout
from longtake.rollout.denoise import Denoiser, commit_block
from longtake.rollout.self_forcing import RollOutNoise


class LatentHistory:
    """Clean latents that a cache can be rebuilt from: the sink frames and the latest window - sink frames.

    Without a window everything is kept. Blocks are appended in order, as they are finished; `position` is the end.
    """

    def __init__(self, plan: StreamPlan) -> None:
        self.plan = plan
        self._blocks: dict[int, Tensor] = {}
        self.position = 0

    def append(self, latents: Tensor) -> None:
        """Adds finished blocks [B, f, C, H, W] that begin at `position`; what no rebuild needs any more is dropped."""
        position, blocks = self.position + latents.shape[1], dict(self._blocks)
        for start, end in self.plan.blocks(self.position, position):
            blocks[start] = latents[:, start - self.position : end - self.position].detach()
        self._blocks = {start: block for start, block in blocks.items() if _is_kept(self.plan, start, position)}
        self.position = position

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first frame, latents) of the kept blocks, in causal order."""
        yield from sorted(self._blocks.items())

    def copy(self) -> LatentHistory:
        """Another one with the same (never changed) latents."""
        other = LatentHistory(self.plan)
        other._blocks, other.position = dict(self._blocks), self.position
        return other


@torch.no_grad()
def recache(
    denoiser: Denoiser,
    cache: KVCache,
    condition: Condition,
    kept: LatentHistory,
    noise: RollOutNoise | None = None,
) -> None:
    """Fills the cache anew from `kept` under `condition`, by the law of its plan, and leaves it at `kept.position`.

    Kept latents are clean. Where the plan's context has a noise level (`StreamPlan.context_level`), a block is stored
    at that level, noised by `noise` of its frames and `plan.context_step`: the same numbers whenever it is done, those
    that a pass of its own would have used, and not those of the last denoising step, whose input is not kept.
    With `plan.keep_sink` the keys and values of the sink, up to `cache.position`, stay as the old condition made them.
    `plan.recache` "last_window": beside the kept sink, the other frames of the window are stored in one call, in which
    all see each other; while the window is not full, all frames are, the sink too. Source: LongLive v1
    (NVlabs/LongLive, pipeline/interactive_causal_inference.py; its block mask has no effect there, specification M-05).
    Where it fails it can be called again, with the cache at the same position.
    Raises: CacheError while a pending backward still reads the cache.
    """
    plan, there, blocks = kept.plan, min(cache.sink_frames, cache.position), dict(kept.blocks())
    stays, calls = _rebuild(plan, kept.position, there if cache.holds(0, there) else 0, list(blocks))
    if stays:
        cache.position = stays
    else:
        cache.clear()
    for call in ([(start, blocks[start]) for start in starts] for starts in calls):
        levels = [plan.context_level(start) for start, latents in call for _ in range(latents.shape[1])]
        cache.skip_to(call[0][0])
        commit_block(denoiser, cache, condition, _context(call, plan, noise), levels if len(call) > 1 else levels[0])
    cache.skip_to(kept.position)


def _is_kept(plan: StreamPlan, start: int, position: int) -> bool:
    """Whether the block at `start` is kept where a stream stands at `position`: in the sink or the latest window."""
    window, sink = plan.window_frames, plan.sink_frames
    return window is None or start < sink or start >= position - (window - sink)


def _rebuild(plan: StreamPlan, position: int, in_sink: int, starts: Sequence[int]) -> tuple[int, list[list[int]]]:
    """How a cache at `position` is made anew: how many of the `in_sink` first frames that it holds stay as they are,
    and the calls that store the rest, by the first frames of their blocks. Args: `starts` of the kept blocks.
    """
    together = plan.recache == "last_window"
    full = plan.window_frames is not None and position > plan.window_frames
    stays = in_sink if plan.keep_sink and (full or not together) else 0
    again = [start for start in starts if start >= stays]
    # Of the blocks that share a call none is in the sink, unless all there is fits into the window.
    alone = sum(start < plan.sink_frames for start in again) * full if together else len(again)
    return stays, [*([start] for start in again[:alone]), *([again[alone:]] if again[alone:] else [])]


@dataclass(frozen=True, eq=False)
class Forced:
    """A teacher-forcing forward over some of `[clean F | noisy F]`: `layout`; `source` [E], which of these frames each
    entry is; `noisy` [F - G], the entries of the noisy ones after the G given frames.
    """

    layout: MaskLayout
    source: Tensor
    noisy: Tensor


def forced(plan: StreamPlan, num_frames: int, switch: int | None = None) -> Forced:
    """Each block as a stream denoises it after the clean ones, in one masked forward. The last block is not there
    clean, which nobody would see, nor are given frames noisy, which nobody predicts.

    With `switch`, a block boundary, the condition's `later_text` holds from there on. The clean blocks before it are
    then there twice, as far as they are needed: as the stream stored them, for the blocks before the switch, and as its
    rebuild stores them anew from what it keeps, for those after it (`recache`, which this mirrors; with "none" once).
    Raises: ConfigError when a frame is no boundary of the plan.
    """
    plan.check(num_frames)
    if switch is None:
        given, last = plan.given_frames, plan.block_of(num_frames - 1)[0]
        layout, both = plan.replay_layout(0, given, num_frames), torch.arange(2 * num_frames)
        return Forced(layout, both[both.lt(last) | both.ge(num_frames + given)], torch.arange(last, layout.num_entries))
    source: list[int] = []
    calls: list[Call] = []
    noisy: dict[int, int] = {}  # entries by frame
    held: dict[int, int] = {}  # of what the cache holds

    def call(start: int, end: int, half: int) -> dict[int, int]:
        plan.check_fits(start, end)
        own = range(len(source), len(source) + end - start)
        calls.append((own, [held[frame] for frame in plan.attended(start, end) if frame in held]))
        source.extend(range(half * num_frames + start, half * num_frames + end))
        return dict(zip(range(start, end), own))

    def go(start: int, end: int, unstored: int) -> None:
        for block in plan.blocks(start, end):
            if block[0] >= plan.given_frames:
                noisy.update(call(*block, half=1))
            if block[0] < unstored:
                held.update(call(*block, half=0))

    before = [start for start, _ in plan.blocks(0, switch)]
    rebuilds = plan.recache != "none"
    # A stream stores a block when the next one is begun, and a rebuild has stored it under the new condition then.
    go(0, switch, unstored=before[-1] if rebuilds else switch)
    later_from = len(source)
    if rebuilds:
        kept = [start for start in before if _is_kept(plan, start, switch)]
        sink = 0 if plan.window_frames is None else min(plan.sink_frames, before[-1])
        stays, anew = _rebuild(plan, switch, sink, kept)
        held = {frame: entry for frame, entry in held.items() if frame < stays}
        for starts in anew:
            held.update(call(starts[0], plan.block_of(starts[-1])[1], half=0))
    go(switch, num_frames, unstored=plan.block_of(num_frames - 1)[0])
    stored = tuple(frame < num_frames for frame in source)
    frames = [frame % num_frames for frame in source]
    layout = packed_layout(frames, calls, plan.rope, later_from=later_from, stored=stored)
    return Forced(layout, torch.tensor(source), torch.tensor([noisy[frame] for frame in sorted(noisy)]))


def _context(blocks: Sequence[tuple[int, Tensor]], plan: StreamPlan, noise: RollOutNoise | None) -> Tensor:
    """What the keys and values of finished blocks, one after the other, are made of again."""
    made = []
    for start, latents in blocks:
        if (level := plan.context_level(start)) > 0:
            assert noise is not None, "a plan whose context has a noise level needs noise"
            drawn = noise(start, start + latents.shape[1], plan.context_step)
            latents = add_noise(latents, drawn, torch.full(latents.shape[:1], level, device=latents.device))
        made.append(latents)
    return torch.cat(made, 1)
