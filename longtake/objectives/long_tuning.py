"""Streaming long tuning: distribution matching on windows of videos that go on over many optimizer steps.

Which video, which part of it and which network an iteration trains follows from the number of the iteration alone
(`LongSchedule`). A run that was stopped in the middle of a sequence therefore goes on with the same chunk of the same
videos; their past is generated again, by the weights as they were saved. Source: specification H; LongLive.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from longtake.condition import Condition
from longtake.errors import ConfigError, DataError
from longtake.models.dit import VideoDiT
from longtake.objectives.base import Phase
from longtake.objectives.batch import EncodedBatch
from longtake.objectives.dmd import DataLoss, Dmd, DmdSettings
from longtake.plan import StreamPlan
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser
from longtake.rollout.long_video import LongStream, PictureCodec, Switch, Window
from longtake.rollout.self_forcing import RollOut


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

    Args: `lengths` in latent frames, of which each sequence draws one; `switches`, the latent frames at which the
    prompt may change, of which each sequence draws one that it reaches (none = never).
    """

    def __init__(
        self, draws: KeyedRNG, horizon: int, new_frames: int, lengths: Sequence[int], switches: Sequence[int] = ()
    ) -> None:
        for length in lengths:
            if length < horizon or (length - horizon) % new_frames:
                below = horizon + max(0, length - horizon) // new_frames * new_frames
                raise ConfigError(
                    f"a length of {length} latents is not horizon={horizon} and a multiple of new_frames={new_frames}; "
                    f"set it to {below} or {below + new_frames}"
                )
        self.draws, self.horizon, self.new_frames = draws, horizon, new_frames
        self.lengths, self.switches = tuple(lengths), tuple(switches)
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
    (`train/long_batches.py`). The generator is trained in every `updates_per_generator`-th iteration, by turns on other
    chunks of a sequence.
    """

    def __init__(
        self,
        generator: Denoiser,
        critic: VideoDiT,
        real: VideoDiT,
        draws: KeyedRNG,
        plan: StreamPlan,
        settings: DmdSettings,
        schedule: LongSchedule,
        codec: PictureCodec,
        *,
        data_loss: DataLoss | None = None,
        phase: Phase = nullcontext,
    ) -> None:
        super().__init__(
            generator, critic, real, draws, plan, schedule.horizon, settings, data_loss=data_loss, phase=phase
        )
        self.schedule, self.codec = schedule, codec
        self._streams: dict[tuple[int, tuple[int, ...]], LongStream] = {}

    def turns(self, step: int) -> list[str]:
        """The critic every iteration, the generator before it in every `updates_per_generator`-th of a sequence,
        counted from another chunk in each sequence, after the head start.
        """
        place = self.schedule.at(step)
        return self._turns(step, place.chunk + place.sequence)

    def discard(self) -> None:
        """Drops the running videos, whose caches may hold what is not finite; their past is generated again."""
        self._streams.clear()

    def _roll_out(self, batch: EncodedBatch, step: int, *, with_grad: bool) -> RollOut:
        place = self.schedule.at(step)
        with self.phase("rollout"):
            stream = self._stream(batch, place)
            return self._advance(stream, batch, place.begin, place.chunk, with_grad=with_grad)

    def _conditions(self, batch: EncodedBatch, made: RollOut) -> tuple[Condition, Condition]:
        assert isinstance(made, Window)
        return made.condition, made.condition.with_text(batch.empty_text)

    def _advance(self, stream: LongStream, batch: EncodedBatch, begin: int, chunk: int, *, with_grad: bool) -> Window:
        step = begin + chunk
        return stream.advance(
            self.schedule.end_frame(chunk),
            self._roll_out_noise(batch, step),
            exit_step=self.exit_step(step),
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
        )
