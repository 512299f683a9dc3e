"""A video in the making: frames block by block, with prompt and picture that change, branches, and ways back.

A session owns everything that grows out of its requests (cache, decoder state, conditions, position). It shares the
generator's networks, which it never changes, with any number of other sessions, in any number of threads. One session
is for one thread at a time. Must know no file of its own; `session_file.py` writes it down.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longtake.condition import Condition
from longtake.errors import ConfigError, nearest
from longtake.inference.frames import Frames, Piece, to_frames
from longtake.inference.host_history import HostHistory
from longtake.inference.pipeline import Pipeline, check_prompt
from longtake.inference.sampling import stream_noise
from longtake.inference.session_file import write_session
from longtake.inference.session_state import SessionInputs, SessionState, remembered
from longtake.models.cache import KVCache
from longtake.plan import StreamPlan
from longtake.rollout.denoise import Guidance
from longtake.rollout.stream import LatentStream

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from longtake.inference.pipeline import Picture


class Session:
    """One video; made by `Generator.open` and `Generator.resume`.

    `next` gives the next frames, and so does a `for` loop. `prompt`, `image` and `image_target` can be set between its
    calls and take effect at the block boundary there, with the next call.
    """

    _is_made = False  # whether all attributes that there will be are there

    def __init__(
        self,
        generator: Pipeline,
        inputs: SessionInputs,
        *,
        seed: int,
        guidance: float,
        negative: str,
        history_blocks: int,
        max_latent_frames: int | None,
        ready_blocks: int = 0,
        history_caches: int | None = None,
    ) -> None:
        self.generator, self.seed, self.guidance, self.negative = generator, seed, guidance, negative
        self.history_blocks, self.max_latent_frames = history_blocks, max_latent_frames
        self.ready_blocks, self.history_caches = min(ready_blocks, history_blocks), history_caches
        self.state = SessionState(inputs)
        self._history: tuple[SessionState, ...] = ()  # the latest ones, never changed
        self._unused: list[KVCache] = []  # caches of a scene that could not be begun
        self._past = HostHistory(generator.copies)  # what the history needs and the caches no longer hold
        # What was asked for and is not in effect yet; `cut`: a new scene begins. A new session begins with one.
        self.wanted, self.cut = inputs, True
        self._is_made = True

    def __setattr__(self, name: str, value: object) -> None:
        # A misspelt `session.promt = ...` would else change nothing, and nobody would know why.
        if self._is_made and name not in self.__dict__ and not hasattr(type(self), name):
            can_be_set = ("prompt", "image", "image_target")
            raise AttributeError(
                f"a session has no attribute {name!r}{nearest(name, can_be_set)}; {', '.join(can_be_set)} can be set"
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        prompt = self.prompt if len(self.prompt) <= 60 else f"{self.prompt[:57]}..."
        return f"Session({prompt!r}, {self.num_frames} frames so far, scene {self.scene}, seed {self.seed})"

    # ---- where it stands --------------------------------------------------------------------------------------------
    @property
    def num_frames(self) -> int:
        """Pixel frames given out so far."""
        return self.state.num_frames

    @property
    def position(self) -> int:
        """Latent frames of the running scene so far."""
        return 0 if self.state.stream is None else self.state.stream.position

    @property
    def scene(self) -> int:
        """Number of the running scene, from 0; -1 before the first frame."""
        return self.state.scene

    @property
    def is_complete(self) -> bool:
        """Whether the scene has the `max_frames` that the session was opened for; `image` begins another one."""
        most, stream = self.max_latent_frames, self.state.stream
        if most is None or self.cut or stream is None:
            return False
        return stream.plan.block_of(self.position)[1] > most

    @property
    def rewindable(self) -> int:
        """The most blocks that `rewind` can take back now."""
        return len(self._history)

    @property
    def host_bytes(self) -> int:
        """What its history takes of the host's memory now, with a GPU page-locked."""
        decoders = [state.decoder for state in self._history if state.decoder is not None]
        return self._past.size_bytes + sum(decoder.put_by_bytes for decoder in decoders)

    # ---- what it follows --------------------------------------------------------------------------------------------
    @property
    def prompt(self) -> str:
        """What happens from the next block on. Setting it makes the cache anew under the new prompt. No cut.

        The kept latents (sink and window, the latest block included) stay; what they left in the cache is computed
        again block by block under the new prompt. Raises: ConfigError when it is empty.
        """
        return self.wanted.prompt

    @prompt.setter
    def prompt(self, text: str) -> None:
        self.wanted = replace(self.wanted, prompt=check_prompt(text))

    @property
    def image(self) -> NDArray[np.uint8] | None:
        """The picture of the scene, uint8 [h, w, 3]; None: it has none. Setting it is a cut.

        From the next call on the video shows a new scene that begins with this picture as latent frame 0 (None: with a
        block that is generated): positions, cache and decoder restart, a target is forgotten, the noise is that of
        another video of the same seed. Its first call gives the first block again.
        Raises: DataError when the picture cannot be read, ConfigError when the weights take none or need one.
        """
        return None if self.wanted.picture is None else to_frames(self.wanted.picture)[0]

    @image.setter
    def image(self, image: Picture | None) -> None:
        self.generator.beginning.check(given=image is not None)
        picture = None if image is None else self.generator.prepare(image)
        self.wanted, self.cut = SessionInputs(self.wanted.prompt, picture), True

    @property
    def image_target(self) -> NDArray[np.uint8] | None:
        """A picture to move towards, uint8 [h, w, 3]; None = the scene's own. Setting it is no cut.

        CLIP tokens and all of `y` but frame 0 become those of the target, and the cache is made anew from the kept
        latents. From the VAE's steady index on (20 latents for the toy, 29 for Wan2.1) `y` holds nothing of any
        picture; then the CLIP tokens alone speak of the target. No published model was trained for it.
        Raises: DataError when the picture cannot be read, ConfigError for weights without CLIP tokens.
        """
        return None if self.wanted.target is None else to_frames(self.wanted.target)[0]

    @image_target.setter
    def image_target(self, image: Picture | None) -> None:
        if image is not None and self.generator.model.config.image_dim is None:
            raise ConfigError(
                "image_target speaks to the model through CLIP tokens, and these weights have none; set `image` for a "
                "cut to another picture"
            )
        self.wanted = replace(self.wanted, target=None if image is None else self.generator.prepare(image))

    # ---- frames -----------------------------------------------------------------------------------------------------
    def next(self) -> NDArray[np.uint8]:
        """The next frames, uint8 [T, h, w, 3].

        The first call of a scene gives its picture as the model sees it (T = 1), or where it has none the first block;
        each later one a block: T = latent frames of a block times the VAE's temporal stride. Memory and work do not
        depend on how long the video is.
        What raises, Ctrl-C and a full memory included, changes nothing: the same call can be made again.
        Raises: ConfigError when a student that keeps every frame has reached `max_frames`; DataError for frames that
        are not finite.
        """
        frames, state = self._made()
        array = frames.array()
        self._advance(state)
        return array

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Yields what `next` gives, for ever, or until the scene has as many frames as the session was opened for. A
        loop that was left can be entered again; it goes on.
        """
        while not self.is_complete:
            yield self.next()

    def begin(
        self, check: Callable[[], None] | None = None, early: Callable[[Piece, int], None] | None = None
    ) -> Frames:
        """The next frames as `next` gives them, but on their way here: work may still run.

        `check` is called between the steps of a block; what it raises ends the call, which then has changed nothing.
        Where a block comes in pieces, `early` is called with the first of them, and with how many frames the block
        has, before the others are decoded, which a CPU does in this call.
        Raises: as `next`.
        """
        frames, state = self._made(check, early)
        self._advance(state)
        return frames

    def _advance(self, state: SessionState) -> None:
        """From here on the session stands there."""
        rules = self.history_blocks, self.ready_blocks, self.history_caches
        history = remembered(self._history, self.state, state, *rules)
        self.state, self._history, self.cut, self._unused = state, history, False, []  # at once, whatever interrupts
        self._past.keep_only(self._streams())

    def _streams(self) -> list[LatentStream]:
        """Those that the session may stand at."""
        return [state.stream for state in (*self._history, self.state) if state.stream is not None]

    @torch.no_grad()
    def _made(
        self, check: Callable[[], None] | None = None, early: Callable[[Piece, int], None] | None = None
    ) -> tuple[Frames, SessionState]:
        """The next frames, and where the session stands then. What the two share is what a further try can use."""
        self._check_length()
        state = self._new_scene() if self.cut else self._next_state()
        assert state.stream is not None and state.decoder is not None
        plan = state.stream.plan
        shown = state.stream.position
        if shown:  # the picture's own latent was encoded with the condition
            state.encode(plan.block_of(shown)[1])
        latents = state.stream.next(check)
        if check is not None:
            check()
        self._past.copies.wait()  # of the decoder's features, which are written over now
        # A viewer waits for the first frames that are generated, or that follow a change: one latent is decoded, and
        # sent, before the others.
        head = 1 if shown <= 1 or state.inputs is not self.state.inputs else latents.shape[1]
        frames = Frames(state.decoder.decode(latents[:, :head])[0], state.num_frames)
        if head < latents.shape[1]:
            if early is not None:
                later = (latents.shape[1] - head) * self.generator.encoders.vae.temporal_stride
                early(frames.pieces[0], len(frames) + later)
            frames.append(state.decoder.decode(latents[:, head:])[0])
        if self.generator.device.type == "cuda":  # while these frames are on their way
            state.encode(plan.block_of(state.stream.position)[1])
        state.num_frames += len(frames)
        return frames, state

    def _next_state(self) -> SessionState:
        """Where the scene goes on: the caches are at its place, and what they will lose is kept for the way back."""
        state = self.state.copy()
        stream = state.stream
        assert stream is not None and self.state.decoder is not None
        if self.history_blocks:
            self._past.bring_back(stream)
            self._past.save_overwritten(stream, self._streams())
        if self.wanted.prompt != state.inputs.prompt or not self.wanted.same_pictures(state.inputs):
            self._change(state)
            if self.history_blocks:
                self._past.save_overwritten(stream, self._streams())
        if self.ready_blocks:  # last: nothing above, which the block's passes wait for, then waits for these
            self.state.decoder.put_by(self._past.copies.of)
        return state

    def _check_length(self) -> None:
        if self.is_complete:
            most = self.max_latent_frames
            raise ConfigError(
                f"this session was opened for scenes of {most} latent frames, which have been made; open one with a "
                "larger max_frames, or set `image` for a new scene"
            )

    def _new_scene(self) -> SessionState:
        generator, state = self.generator, self.state
        kept = [] if state.stream is None else state.stream.caches
        if not kept and not self._unused:
            self._unused = self.new_caches()  # before the encoders are at work, for which a borrowed one would wait
        condition, first_latent, y = generator.begin_condition(self.wanted.picture, self.wanted.prompt)
        scene, unconditional = state.scene + 1, self._unconditional(condition)
        caches = kept or self._unused
        if self.history_blocks:
            self._past.save_all(caches, self._streams())
        for cache in caches:
            cache.clear()
        plan = generator.beginning.plan_of(given=first_latent is not None)
        stream = self.new_stream(scene, caches, condition, unconditional, first_latent, plan)
        inputs, decoder = replace(self.wanted, target=None), generator.new_decoder()
        new = SessionState(inputs, stream, decoder, y, scene, state.num_frames)
        if self.wanted.target is not None:
            self._change(new)
        return new

    def new_caches(self) -> list[KVCache]:
        """Empty ones for a scene."""
        return self.generator.new_caches(self, self.history_blocks, self.max_latent_frames, self.guidance)

    def new_stream(
        self,
        scene: int,
        caches: list[KVCache],
        condition: Condition,
        unconditional: Condition | None,
        first_latent: Tensor | None,
        plan: StreamPlan,
    ) -> LatentStream:
        """The stream of a scene that goes on where `caches` stand; its noise is that of video `scene` of the seed."""
        denoiser = self.generator.denoiser
        size, channels = self.generator.latent_size, denoiser.model.config.out_channels
        noise = stream_noise(self.seed, [scene], channels, size, self.generator.device)
        guidance = None
        if unconditional is not None:
            guidance = Guidance(self.guidance, unconditional, caches[1])
        return LatentStream(denoiser, caches[0], condition, first_latent, noise, plan, guidance=guidance)

    def _change(self, state: SessionState) -> None:
        """Another prompt or target within the scene."""
        wanted, stream = self.wanted, state.stream
        assert stream is not None
        if wanted.same_pictures(state.inputs):
            condition = stream.condition.with_text(self.generator.encoders.text.encode([wanted.prompt]))
        else:
            condition, _ = self.generator.condition(wanted.picture, wanted.prompt)
            if wanted.target is not None:
                condition = self._towards(condition, wanted.target)
            state.y = None
        stream.change(condition, self._unconditional(condition))
        state.inputs = wanted

    def _towards(self, condition: Condition, target: Tensor) -> Condition:
        other, _ = self.generator.condition(target, self.wanted.prompt)
        if condition.frames is None or other.frames is None:
            return replace(condition, image=other.image)
        return replace(
            condition, image=other.image, frames=torch.cat([condition.frames[:, :1], other.frames[:, 1:]], 1)
        )

    def _unconditional(self, condition: Condition) -> Condition | None:
        """The condition of guidance: the same pictures under the negative prompt."""
        if self.guidance == 1:
            return None
        return condition.with_text(self.generator.encoders.text.encode([self.negative]))

    # ---- branches and ways back -------------------------------------------------------------------------------------
    def fork(self) -> Session:
        """Another session at the same place, history included; it shares the networks with this one and nothing else.

        If nothing is changed, both go on with the same frames, bit for bit. It takes as much memory as this one.
        """
        for state in (self.state, *self._history):
            state.encode()  # nothing that is still written to is shared
        other = copy.copy(self)
        clones: dict[int, KVCache] = {}
        other.state, other._unused = self.state.copy(clones), []
        other._history, other._past = tuple(past.copy(clones) for past in self._history), self._past.copy()
        return other

    def rewind(self, num_blocks: int, *, keep_wanted: bool = False) -> None:
        """Takes back the last `num_blocks` calls of `next`, cuts and changes of prompt or picture between them too.

        The session stands where it stood right after the call before those; what was set since is forgotten. If nothing
        is changed, the same frames come again, bit for bit. `keep_wanted`: what was set since, cuts too, takes effect
        there, with the next call.
        Raises: ConfigError when it is not between 1 and `rewindable`.
        """
        if not 1 <= num_blocks <= len(self._history):
            raise ConfigError(
                f"rewind({num_blocks}) is not possible: {len(self._history)} blocks can be taken back now, and never "
                f"more than history_blocks={self.history_blocks}"
            )
        past, history = self._history[-num_blocks], self._history[:-num_blocks]
        wanted, cut = past.inputs, past.stream is None
        if keep_wanted:
            wanted, cut = self.wanted, cut or self.cut or past.scene != self.scene
        self.state, self._history, self.wanted, self.cut = past, history, wanted, cut
        if past.stream is not None:
            self._past.forget(past.stream)
        self._past.keep_only(self._streams())

    def save(self, path: str | Path) -> None:
        """Writes the session into one file, for `Generator.resume`; the file appears whole or not at all.

        The history is not written: after resuming, `rewind` reaches back to this point and no further.
        Raises: OutputError when the file cannot be written; ConfigError when several processes make the video together.
        """
        if self.generator.model.execution.split is not None:
            raise ConfigError("a session file holds the cache of one process; save without sequence parallelism")
        self.state.encode()
        if self.state.stream is not None:
            self._past.bring_back(self.state.stream)
            self.state.stream.return_to_cache()
        values, tensors = self._written()
        write_session(Path(path), values, tensors, self.generator)

    def _written(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that `restored` needs: values that JSON can say, and tensors."""
        state, looks = self.state, {"inputs": self.state.inputs, "wanted": self.wanted}
        shown = [picture for inputs in looks.values() for picture in (inputs.picture, inputs.target)]
        pictures = list({id(picture): picture for picture in shown if picture is not None}.values())
        number = {id(picture): index for index, picture in enumerate(pictures)}
        tensors = {f"picture.{index}": picture for index, picture in enumerate(pictures)}
        values: dict[str, Any] = {
            name: {
                "prompt": inputs.prompt,
                "picture": number.get(id(inputs.picture)),
                "target": number.get(id(inputs.target)),
            }
            for name, inputs in looks.items()
        }
        values |= {
            "cut": self.cut,
            "seed": self.seed,
            "guidance": self.guidance,
            "negative": self.negative,
            "max_latent_frames": self.max_latent_frames,
            "scene": state.scene,
            "num_frames": state.num_frames,
            "position": self.position,
            "caches": [],
            "decoder": None,
        }
        if state.stream is None or state.decoder is None:
            return values, tensors
        stream = state.stream
        for name in ("text", "image", "frames"):
            if (part := getattr(stream.condition, name)) is not None:
                tensors[f"condition.{name}"] = part
        if stream.guidance is not None:
            tensors["unconditional.text"] = stream.guidance.condition.text
        tensors |= {f"kept.{start}": latents for start, latents in stream.kept.blocks()}
        values["pending"] = stream.pending is not None
        block = stream.plan.block_frames if stream.pending is None else stream.pending.clean.shape[1]
        if stream.pending is not None and stream.pending.sigma > 0:
            tensors["pending.context"] = stream.pending.context
        for index, cache in enumerate(stream.caches):
            frames = cache.attended_frames(block)
            tensors[f"cache.{index}.keys"], tensors[f"cache.{index}.values"] = cache.stored(frames)
            values["caches"].append({"position": cache.position, "frames": frames})
        features, values["decoder"] = state.decoder.state()
        return values, tensors | {f"decoder.{slot}": kept for slot, kept in features.items()}
