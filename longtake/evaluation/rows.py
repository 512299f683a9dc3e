"""Rows of the evaluation: held-out worlds, the ways to make videos of them, and their exact scores.

A row is a function from a batch of worlds to uint8 videos. Ranks share the worlds and gather the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtake.condition import Condition, pixel_frames
from longtake.devices import num_cores
from longtake.encoders.bundle import Encoders
from longtake.errors import ConfigError
from longtake.inference.frames import to_frames
from longtake.inference.pipeline import picture_condition
from longtake.inference.sampling import student_latents, teacher_latents
from longtake.models.dit import VideoDiT
from longtake.parallel.mesh import Mesh
from longtake.plan import StreamPlan
from longtake.processes import answered, spawned
from longtake.rollout.denoise import Denoiser
from longtake.toy.metrics import WorldScores, measure
from longtake.toy.story import sample_story
from longtake.toy.windows import WindowRule
from longtake.toy.world import World, sample_world

_FRAMES_A_PROCESS = 2_000  # fewer are measured (1 ms each) faster than a process starts
_MEASURING = "the scores of videos"

Videos = list[NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class WorldBatch:
    """Some held-out worlds with their conditions.

    Fields: `numbers`, their indices; `counted`, False for padding; `other_text` [B, M, text_dim], the captions of the
    worlds that follow in the list, whatever the batch holds; `later`, the conditions after each of `switch_frames`
    (latent frames).
    """

    worlds: list[World]
    numbers: list[int]
    counted: list[bool]
    condition: Condition
    empty_text: Tensor
    other_text: Tensor
    picture_latent: Tensor
    num_latent_frames: int
    encoders: Encoders
    later: tuple[Condition, ...] = ()
    switch_frames: tuple[int, ...] = ()

    @property
    def num_frames(self) -> int:
        return pixel_frames(self.num_latent_frames, self.encoders.vae.temporal_stride)

    @property
    def size(self) -> tuple[int, int]:
        return self.picture_latent.shape[3], self.picture_latent.shape[4]

    @cached_property
    def truth(self) -> Videos:
        """The true videos."""
        return [world.render(self.num_frames) for world in self.worlds]

    def decode(self, latents: Tensor) -> Videos:
        """uint8 videos of latents [B, F, C, H, W]."""
        return [to_frames(video) for video in self.encoders.vae.decode(latents)]


Row = Callable[[WorldBatch], Videos]


def held_out(
    encoders: Encoders,
    mesh: Mesh,
    *,
    seed: int,
    num_worlds: int,
    num_latent_frames: int,
    batch_size: int,
    only: Sequence[int] | None = None,
    with_y: bool = True,
    switch_frames: Sequence[int] = (),
) -> list[WorldBatch]:
    """This rank's share of the held-out worlds, as many on every rank (uncounted repeats fill up).

    Args: `only`, the indices of the worlds (at least `num_worlds`); by default the first ones. `with_y` False for
    models that know the picture as a clean frame 0 alone. `switch_frames`, latent frames at which the captions change;
    they must be block boundaries of the students, so that the truth changes with the first frame that a student makes
    under the new caption.
    """
    listed = list(range(num_worlds)) if only is None else list(only[:num_worlds])
    per_rank = -(-len(listed) // mesh.num_data_ranks)
    mine = [mesh.data_rank + k * mesh.num_data_ranks for k in range(per_rank)]
    switches, text = tuple(switch_frames), encoders.text.encode
    switch_pixels = [pixel_frames(frame, encoders.vae.temporal_stride) for frame in switches]
    batches = []
    for start in range(0, per_rank, batch_size):
        numbers = mine[start : start + batch_size]
        counted = [number < len(listed) for number in numbers]
        indices = [listed[number % len(listed)] for number in numbers]
        worlds = [sample_story(seed, index, switch_pixels) for index in indices]
        other = text([sample_world(seed, index + 1).caption for index in indices])
        pictures = to_videos([world.render(1) for world in worlds], mesh.device)[:, 0]
        captions = [world.caption for world in worlds]
        condition, picture = picture_condition(encoders, pictures, captions, with_y=with_y)
        empty = text([""]).expand(len(worlds), -1, -1)
        segments = ([world.switches[k].caption for world in worlds] for k in range(len(switches)))
        later = tuple(condition.with_text(text(captions)) for captions in segments)
        batch = WorldBatch(
            worlds, numbers, counted, condition, empty, other, picture, num_latent_frames, encoders, later, switches
        )
        batches.append(batch)
    return batches


def to_videos(pixels: Videos, device: torch.device) -> Tensor:
    """uint8 videos of one length as a batch [B, T, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(np.stack(pixels)).to(device).permute(0, 1, 4, 2, 3).float().div(127.5).sub(1)


def caption(world: World) -> str:
    """What a world's captions say, and from which pixel frame on."""
    later = (f"from frame {switch.frame} on: {switch.caption}" for switch in world.switches)
    return "; ".join([world.caption, *later])


def truth(batch: WorldBatch) -> Videos:
    """The true videos: what the metric itself makes of perfection."""
    return batch.truth


def vae_round_trip(batch: WorldBatch) -> Videos:
    """The true videos through the VAE: what no model on these latents can beat."""
    return batch.decode(batch.encoders.vae.encode(to_videos(batch.truth, batch.picture_latent.device)))


def frozen(batch: WorldBatch) -> Videos:
    """The first frame for ever: what a student that froze would score."""
    return [np.repeat(video[:1], len(video), 0) for video in batch.truth]


def teacher_row(model: VideoDiT, *, first_frame_clean: bool, **sampling: Any) -> Row:
    """Bidirectional weights with many steps and guidance; `sampling`: `seed`, `num_steps`, `shift` and `guidance`."""

    def make(batch: WorldBatch) -> Videos:
        given: dict[str, Any] = {"first_latent": batch.picture_latent if first_frame_clean else None, **sampling}
        sizes = batch.num_latent_frames, batch.size
        return batch.decode(
            teacher_latents(model, batch.condition, batch.empty_text, *sizes, videos=batch.numbers, **given)
        )

    return make


def student_row(denoiser: Denoiser, plan: StreamPlan, *, seed: int) -> Row:
    """Weights streamed causally in a few steps."""

    def make(batch: WorldBatch) -> Videos:
        switches: dict[str, Any] = {"later": batch.later, "switch_frames": batch.switch_frames}
        begin, sizes = (batch.condition, batch.picture_latent), (batch.num_latent_frames, batch.size)
        return batch.decode(
            student_latents(denoiser, *begin, plan, *sizes, seed=seed, videos=batch.numbers, **switches)
        )

    return make


def broken_row(row: Row, broken: str) -> Row:
    """Another row with one condition taken away, to show that it is used: `y`, `clip`, or `text` (another world's)."""
    return lambda batch: row(replace(batch, condition=break_condition(batch, broken)))


def break_condition(batch: WorldBatch, broken: str) -> Condition:
    """The condition with one part useless: `y` or `clip` zeroed, `text` that of the world after.

    Raises: ConfigError when the condition has no such part, so that nothing counts as broken that is whole.
    """
    condition = batch.condition
    if broken == "y" and condition.frames is not None:
        return replace(condition, frames=torch.zeros_like(condition.frames))
    if broken == "clip" and condition.image is not None:
        return replace(condition, image=torch.zeros_like(condition.image))
    if broken == "text":
        return condition.with_text(batch.other_text)
    raise ConfigError(f"the condition has no part {broken!r} to break; y, clip (with an image encoder) and text can be")


def score_row(
    row: Row,
    batches: Sequence[WorldBatch],
    mesh: Mesh,
    *,
    rule: WindowRule | None = None,
    scorers: Executor | None = None,
) -> tuple[list[WorldScores], Videos]:
    """As `begin_row`, its videos measured: scores of all counted worlds in order, on every rank."""
    mine, shown = begin_row(row, batches, rule=rule, scorers=scorers)
    return row_scores(mine, mesh), shown


# By the number of its world, of each video of this rank
Scoring = list[tuple[int, WorldScores | Future[WorldScores]]]


def begin_row(
    row: Row, batches: Sequence[WorldBatch], *, rule: WindowRule | None = None, scorers: Executor | None = None
) -> tuple[Scoring, Videos]:
    """What this rank's counted worlds score, and its first batch of videos.

    Args: `rule` asks for scores window by window; `scorers` measure while something else is done.
    """
    mine: Scoring = []
    shown: Videos = []
    for batch in batches:
        videos = row(batch)
        shown = shown or videos
        for world, number, counted, video in zip(batch.worlds, batch.numbers, batch.counted, videos):
            if counted:
                with answered(_MEASURING):
                    done = scorers.submit(measure, world, video, rule) if scorers else measure(world, video, rule)
                mine.append((number, done))
    return mine, shown


def row_scores(mine: Scoring, mesh: Mesh) -> list[WorldScores]:
    """Those of all ranks in the order of the worlds; all ranks call it."""

    def scored() -> list[tuple[int, WorldScores]]:
        with answered(_MEASURING):
            found = [(number, done.result() if isinstance(done, Future) else done) for number, done in mine]
        return found if mesh.leads_sequence else []

    gathered = [pair for part in mesh.every(scored) for pair in part]
    return [scores for _, scores in sorted(gathered, key=lambda pair: pair[0])]


@contextmanager
def scorer_processes(num_frames: int, mesh: Mesh) -> Iterator[Executor | None]:
    """Processes that measure `num_frames` frames in all, this rank's share of the processors; None when few."""
    processes = min(num_cores() // mesh.world_size, num_frames // _FRAMES_A_PROCESS)
    if processes < 2:
        yield None
        return
    with spawned(processes) as pool:
        yield pool
