"""Streaming long tuning: distribution matching on windows of videos that go on over many optimizer steps.

Which video, which part of it and which network an iteration trains follows from the number of the iteration alone
(`LongSchedule`). A run that was stopped in the middle of a sequence therefore goes on with the same chunk of the same
videos; their past is generated again, by the weights as they were saved. Source: specification H; LongLive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from longtake.config.objective import NetworkConfig
from longtake.errors import ConfigError, DataError
from longtake.objectives.base import Objective, Parts
from longtake.objectives.dmd import Dmd, DmdConfig
from longtake.objectives.held_batches import HeldBatches
from longtake.objectives.in_context import ContextScores
from longtake.plan import StreamPlan

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.condition import Condition, MaskLayout
    from longtake.models.flops import Call
    from longtake.objectives.batch import EncodedBatch
    from longtake.objectives.scores import Score
    from longtake.rng import KeyedRNG
    from longtake.rollout.long_video import LongStream, Window
    from longtake.rollout.self_forcing import RollOut


class LongTuningConfig(DmdConfig):
    """Long tuning: videos beyond the teacher's length, generated and scored chunk by chunk."""

    kind: Literal["long_tuning"] = "long_tuning"  # type: ignore[assignment]
    num_chunks: list[int] = Field(
        default=[12], min_length=1, description="chunks of a whole video, one iteration each; one of these is drawn"
    )
    new_frames: int | None = Field(
        default=None,
        gt=0,
        description="latent frames of each chunk after the first, which is as long as the teacher's clips; null = all "
        "but one of those",
    )
    switch_frames: list[int] = Field(
        default=[],
        description="latent frames, block boundaries, at which the row's second prompt takes over; each video draws "
        "one that it reaches; none = never",
    )

    context_scores: ContextScores = Field(default=ContextScores(), description=ContextScores.__doc__)

    decodes: ClassVar[bool] = True
    # An iteration is a place in a sequence of chunks of the same rows.
    resume_keys: ClassVar[tuple[str, ...]] = (
        "batch_size",
        "video.num_latent_frames",
        "objective.num_chunks",
        "objective.new_frames",
        "objective.switch_frames",
    )

    @property
    def reference(self) -> str | None:  # type: ignore[override]
        """None where the teacher is causal and makes no whole clips."""
        return None if self.context_scores.history_frames else "teacher"

    def networks(self) -> Mapping[str, NetworkConfig]:
        """As of `dmd`; scores in context are those of causal networks."""
        causal = bool(self.context_scores.history_frames)
        return {name: replace(network, causal=causal) for name, network in super().networks().items()}

    @model_validator(mode="after")
    def _check_chunks(self) -> Self:
        if min(self.num_chunks) < 1:
            raise ValueError(f"num_chunks={self.num_chunks} must all be at least 1")
        if self.critic.updates_per_rollout > 1:
            raise ValueError(
                f"critic.updates_per_rollout={self.critic.updates_per_rollout}: every iteration of long tuning makes "
                "the next chunk of its videos, which the critic sees once; set it to 1"
            )
        return self

    @property
    def second_prompts(self) -> bool:
        return bool(self.switch_frames)

    def check(self, plan: StreamPlan, num_latent_frames: int, *, with_picture: bool, lora: bool) -> None:
        """Raises ConfigError unless all chunks and switches are at block boundaries and within a video."""
        super().check(plan, num_latent_frames, with_picture=with_picture, lora=lora)
        self.context_scores.check(plan)
        new = self.new_frames or num_latent_frames - 1
        if not plan.is_boundary(num_latent_frames + new) or new >= num_latent_frames:
            fix = (num_latent_frames - 1) // plan.block_frames * plan.block_frames
            raise ConfigError(
                f"objective.new_frames={new} must be a multiple of plan.block_frames={plan.block_frames} below "
                f"video.num_latent_frames={num_latent_frames}; set it to {fix}"
            )
        for frame in self.switch_frames:
            if frame < plan.first_frames or not plan.is_boundary(frame):
                below, above = plan.block_of(max(frame, plan.first_frames))
                raise ConfigError(
                    f"objective.switch_frames={self.switch_frames}: {frame} is no block boundary after the first "
                    f"block; set it to {below} or {above}"
                )
        longest = num_latent_frames + (max(self.num_chunks) - 1) * new
        if late := [frame for frame in self.switch_frames if frame >= longest]:
            raise ConfigError(
                f"objective.switch_frames={late} are not before the end of the longest video, {longest} latent "
                "frames; lower them or raise objective.num_chunks"
            )

    def build(self, parts: Parts) -> Objective:
        """The objective."""
        return LongTuning(parts, self)


@dataclass(frozen=True)
class Place:
    """Where an iteration is: chunk number `chunk` of sequence number `sequence`, which began at iteration `begin`.

    The sequence has `length` latent frames in all; its prompt changes at latent frame `switch` (None: never).
    """

    sequence: int
    chunk: int
    begin: int
    length: int
    switch: int | None


class LongSchedule:
    """Sequences of chunks, one chunk an iteration: `horizon` latents first, then `new_frames` more each time.

    Each sequence draws its number of chunks, and the latent frame at which its prompt changes, of those it reaches.
    """

    def __init__(self, draws: KeyedRNG, horizon: int, settings: LongTuningConfig) -> None:
        self.draws, self.horizon, self.new_frames = draws, horizon, settings.new_frames or horizon - 1
        self.lengths = [self.end_frame(chunks - 1) for chunks in settings.num_chunks]
        self.switches = settings.switch_frames
        self._places: list[Place] = []  # the first chunk of each sequence so far

    def at(self, step: int) -> Place:
        """The place of iteration `step`."""
        while not self._places or self._end(self._places[-1]) <= step:
            begin = self._end(self._places[-1]) if self._places else 0
            self._places.append(self._sequence(len(self._places), begin))
        number = next(k for k in reversed(range(len(self._places))) if self._places[k].begin <= step)
        first = self._places[number]
        return Place(number, step - first.begin, first.begin, first.length, first.switch)

    def end_frame(self, chunk: int) -> int:
        """Latent frames that there are after a chunk."""
        return self.horizon + chunk * self.new_frames

    def _end(self, place: Place) -> int:
        return place.begin + 1 + (place.length - self.horizon) // self.new_frames

    def _sequence(self, number: int, begin: int) -> Place:
        length = self.lengths[self.draws.integer(number, "long_length", 0, len(self.lengths))]
        reached = [frame for frame in self.switches if frame < length]
        switch = reached[self.draws.integer(number, "long_switch", 0, len(reached))] if reached else None
        return Place(number, 0, begin, length, switch)


class LongTuning(Dmd):
    """`Dmd` whose clips are windows of running videos, one chunk an iteration.

    Each micro-batch has running videos of its own; the loop must give the same micro-batches for a whole sequence
    (`batches`). The generator is trained in every `updates_per_generator`-th iteration, by turns on other
    chunks of a sequence.
    """

    def __init__(self, parts: Parts, settings: LongTuningConfig) -> None:
        super().__init__(parts, settings)
        assert parts.codec is not None, "whoever builds an objective that decodes gives it a codec"
        self.schedule, self.codec = LongSchedule(parts.draws, parts.num_frames, settings), parts.codec
        self._streams: dict[tuple[int, tuple[int, ...]], LongStream] = {}
        self.context_scores = settings.context_scores
        self._layouts: dict[tuple[int, int], MaskLayout] = {}

    def turns(self, step: int) -> list[str]:
        """The critic every iteration, the generator before it in every `updates_per_generator`-th of a sequence,
        counted from another chunk in each sequence, after the head start.
        """
        place = self.schedule.at(step)
        return self._turns(step, place.chunk + place.sequence)

    def discard(self) -> None:
        """Drops the running videos, whose caches may hold what is not finite; their past is generated again."""
        self._streams.clear()

    def batches(self, loaded: Any, batch_size: int) -> HeldBatches:
        """The same micro-batches for all iterations of a sequence."""
        return HeldBatches(loaded, lambda step: self.schedule.at(step).sequence, batch_size=batch_size)

    def chunk(self, step: int) -> int:
        """The chunk that the iteration adds."""
        return self.schedule.at(step).chunk

    def _generated(self, step: int) -> tuple[int, int]:
        chunk = self.chunk(step)
        return self.schedule.end_frame(chunk - 1) if chunk else self.parts.given, self.schedule.end_frame(chunk)

    def _roll_out(self, batch: EncodedBatch, step: int, *, with_grad: bool) -> RollOut:
        place = self.schedule.at(step)
        with self.phase("rollout"):
            stream = self._stream(batch, place)
            return self._advance(stream, batch, place.begin, place.chunk, with_grad=with_grad)

    def _shows_its_row(self, step: int) -> bool:
        place = self.schedule.at(step)
        return place.switch is None or self.schedule.end_frame(place.chunk) <= place.switch

    def _score(self, batch: EncodedBatch, made: RollOut, step: int, turn: str) -> Score:
        settings, context = self.context_scores, made.latents.detach()
        if not settings.history_frames:
            return super()._score(batch, made, step, turn)
        import torch

        from longtake.flow.path import add_noise
        from longtake.objectives.in_context import score_in

        frames, given = context.shape[1], self.parts.given
        levels = self.plan.context_levels(frames)
        if settings.sigma is not None:
            levels = [0.0] * given + [settings.sigma] * (frames - given)
        sigma = torch.tensor(levels, device=context.device).expand(len(context), -1)
        if any(levels):
            noise = self.draws.noise(step, f"{turn}_context", batch.indices, context.shape[1:], context.device)
            context = add_noise(context, noise, sigma)
        start, end = self._generated(step)
        return score_in(context, sigma, self._layout(step), end - start)

    def _layout(self, step: int) -> MaskLayout:
        """Who sees whom where the window of an iteration is scored in context."""
        (start, end), sink = self._generated(step), self.plan.sink_frames
        since = start - self.context_scores.history_frames
        before = sum(stop - begin for begin, stop in self.plan.blocks(0, start) if begin < sink or begin >= since)
        if (key := (before, end - start)) not in self._layouts:
            self._layouts[key] = self.plan.replay_layout(0, before, sum(key))
        return self._layouts[key]

    def _score_call(self, step: int, clip: Call) -> Call:
        return clip.masked(self._layout(step)) if self.context_scores.history_frames else clip

    def _section(self, clip: Tensor, step: int) -> Tensor:
        start, end = self._generated(step)
        if not (self.context_scores.history_frames and self.chunk(step)):
            return clip
        # New frames alone, of the clip too: latents of a picture vary more than those of a video's later frames.
        return clip[:, start - end :]

    def _conditions(self, batch: EncodedBatch, made: RollOut) -> tuple[Condition, Condition]:
        from longtake.rollout.long_video import Window

        assert isinstance(made, Window)
        return made.condition, made.condition.with_text(batch.empty_text)

    def _advance(self, stream: LongStream, batch: EncodedBatch, begin: int, chunk: int, *, with_grad: bool) -> Window:
        step = begin + chunk
        return stream.advance(
            self.schedule.end_frame(chunk),
            self._roll_out_noise(batch, step),
            exit_step=self.exits(step),
            with_grad=with_grad,
        )

    def _stream(self, batch: EncodedBatch, place: Place) -> LongStream:
        """The running videos of a micro-batch before chunk `place.chunk`; a missing past is generated now."""
        key = place.sequence, tuple(batch.indices)
        self._streams = {k: stream for k, stream in self._streams.items() if k[0] == place.sequence}
        if key not in self._streams:
            stream = self._streams[key] = self._open(batch, place)
            for chunk in range(place.chunk):
                self._advance(stream, batch, place.begin, chunk, with_grad=False)
        return self._streams[key]

    def _open(self, batch: EncodedBatch, place: Place) -> LongStream:
        from longtake.rollout.long_video import LongStream, Switch

        switch = None
        if place.switch is not None:
            if batch.later_text is None:
                raise DataError("the prompt switches in mid-stream, and the rows have only one; give two prompts a row")
            switch = Switch(place.switch, batch.later_text)
        return LongStream(
            self.generator,
            batch.condition,
            batch.first_latent,
            self.plan,
            batch.latent_size,
            self.codec,
            horizon=self.schedule.horizon,
            max_frames=place.length,
            spare_frames=self.schedule.horizon if self.generator.rereads else 0,
            switch=switch,
            history_frames=self.context_scores.history_frames,
        )
