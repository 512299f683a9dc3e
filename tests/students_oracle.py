"""How published students stream, by brute force in float64: the judge of the rules in `assets/students.yaml`.

Written from specification P, T, I.1 and H.5 and from LongLive's own inference code; it imports nothing of Longtake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import oracle
import torch
from torch import Tensor

FOUR = (1.0, 15 / 16, 5 / 6, 5 / 8)  # u 1000/750/500/250 warped by shift 5
RCM = (1600 / 1601, 15 / 16, 5 / 6, 5 / 8)


def in_bfloat16(clock: float) -> float:
    """Of 8 significant bits: 1000, 936, 832 and 624 of 999.375, 937.5, 833.3 and 625."""
    step = 2.0 ** (math.floor(math.log2(clock)) - 7)
    return round(clock / step) * step


Noise = Callable[[int, int, int], Tensor]  # (start, end, step) -> [B, end - start, C, H, W]


@dataclass(frozen=True)
class Rule:
    """Frames of a block, attended frames with and sink frames, positions, noise levels of the first generated block and
    of all others, whether the last step is the context, what the network reads of 1000 times a level, and what a switch of prompt does to the cache.
    """

    block: int = 3
    window: int = 21
    sink: int = 0
    rope: str = "absolute"
    first: Sequence[float] = FOUR
    later: Sequence[float] | None = None
    noisy_context: bool = False
    clock: Callable[[float], float] = float
    switch: str = "not published"


PUBLISHED = {
    "LongLive": Rule(window=12, sink=3, switch="the last frames in one call"),
    "Self-Forcing (DMD)": Rule(),
    "Self-Forcing (SiD)": Rule(),
    "Self-Forcing (SiD v2)": Rule(),
    "Self-Forcing (GAN)": Rule(),
    "CausVid (3 steps)": Rule(first=(1.0, 28 / 37, 12 / 23), clock=round),  # u .28 and .12 by shift 8
    "CausVid (4 steps)": Rule(first=(1.0, 0.96, 8 / 9, 8 / 11)),
    "Causal-Forcing (chunkwise)": Rule(),
    "Causal-Forcing (framewise)": Rule(block=1),
    "Causal-Forcing++ (2 steps)": Rule(block=1, later=(1.0, 5 / 6)),
    "Causal-Forcing++ (1 step)": Rule(block=1, later=(1.0,)),
    "Self-Gradient-Forcing (chunkwise)": Rule(window=12, sink=3, rope="relative", switch="nothing"),
    "Self-Gradient-Forcing (framewise)": Rule(block=1, window=21, sink=4, rope="relative", switch="nothing"),
    "Self-Gradient-Forcing+ (chunkwise)": Rule(window=12, sink=3, rope="relative", switch="nothing"),
    "Self-Gradient-Forcing+ (framewise)": Rule(block=1, window=21, sink=4, rope="relative", switch="nothing"),
    "Causal-rCM (framewise, 4 steps)": Rule(block=1, clock=in_bfloat16, first=RCM),
    "Causal-rCM (framewise, 2 steps)": Rule(block=1, clock=in_bfloat16, first=RCM, later=(RCM[0], 5 / 6)),
    "Causal-rCM (framewise, 2 steps, noisy context)": Rule(
        block=1, clock=in_bfloat16, first=RCM, later=(RCM[0], 5 / 8), noisy_context=True
    ),
    "Causal-rCM (chunkwise, 4 steps)": Rule(clock=in_bfloat16, first=RCM),
    "Causal-rCM (chunkwise, 2 steps)": Rule(clock=in_bfloat16, first=RCM, later=(RCM[0], 5 / 6)),
}


def stream(
    rule: Rule,
    state: dict[str, Tensor],
    texts: Sequence[Tensor],
    noise: Noise,
    num_frames: int,
    *,
    num_heads: int,
    text_len: int,
    switch_frame: int | None = None,
    given: Tensor | None = None,
    writer: dict[str, Tensor] | None = None,
) -> Tensor:
    """Latents [B, F, C, H, W] of a video under `texts[0]` [B, M, D], from the first block at or after `switch_frame`
    under `texts[1]`; `given` [B, f, C, H, W], a first block that is not generated; `writer`, other weights, which the
    passes after a block have, with what they make of the text.
    """
    weights = {name: tensor.double() for name, tensor in state.items()}
    others = weights if writer is None else {name: tensor.double() for name, tensor in writer.items()}
    videos = []
    for b in range(len(texts[0])):
        prompts = [oracle._text(weights, text[b].double(), text_len) for text in texts]
        sample = oracle._Sample(weights, prompts[0], None, None, num_heads, rule.window, rule.sink, rule.rope)
        theirs = [oracle._text(others, text[b].double(), text_len) for text in texts]
        number, switched = 0, switch_frame is None
        made = list(given[b].double()) if given is not None else []
        if made:
            _store(sample, 0, torch.stack(made), others, theirs[0])
        while len(made) < num_frames:
            start = len(made)
            if not switched and start >= switch_frame:
                sample.context, switched = prompts[1], True
                _recache(rule, sample, made)
            levels = rule.first if number == 0 or rule.later is None else rule.later
            noisy_context = rule.noisy_context and start > 0  # a picture is the first block
            drawn = [noise(start, start + rule.block, step)[b].double() for step in range(len(levels))]
            x = drawn[0] * levels[0]
            for step, level in enumerate(levels):
                keep = noisy_context and step == len(levels) - 1
                read = torch.full((rule.block,), rule.clock(1000 * level) / 1000, dtype=torch.float64)
                velocity = torch.stack(sample.block(start, x, read, keep=keep))
                clean = x - level * velocity
                if step + 1 < len(levels):
                    x = (1 - levels[step + 1]) * clean + levels[step + 1] * drawn[step + 1]
            if not noisy_context:
                _store(sample, start, clean, others, theirs[sample.context is not prompts[0]])
            made += list(clean)
            number += 1
        videos.append(torch.stack(made[:num_frames]))
    return torch.stack(videos)


def _store(sample: oracle._Sample, start: int, latents: Tensor, weights: dict[str, Tensor], text: Tensor) -> None:
    """The pass after a block, by these weights, with what they make of the text."""
    before = sample.w, sample.context
    sample.w, sample.context = weights, text
    sample.block(start, latents, torch.zeros(len(latents)), keep=True)
    sample.w, sample.context = before


def _recache(rule: Rule, sample: oracle._Sample, made: list[Tensor]) -> None:
    """LongLive passes its last `window` frames again, which see each other and the sink as it was; what would be written
    over the sink is dropped, unless the video is not longer than the window.
    """
    if rule.switch == "nothing":
        return
    assert rule.switch == "the last frames in one call"
    start = max(0, len(made) - rule.window)
    if start == 0:
        sample.held = []
    else:
        start += rule.sink
        sample.held = list(range(rule.sink))
    sample.block(start, torch.stack(made[start:]), torch.zeros(len(made) - start), keep=True)
