"""A video that goes on over many optimizer steps: generated chunk by chunk, scored in windows of the teacher's length.

Source: LongLive (arXiv 2509.22622, streaming long tuning) and specification H; what image-to-video needs (H.6) is in
no published system. The student reads its condition by absolute frame. Teacher and critic know a window only: its first
latent is a picture, the last pixel frame before the window's other latents, encoded anew, and it is given to them as
the picture of an image-to-video clip (mask, `y`, CLIP tokens). Memory does not depend on the length of the video.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from longtake.condition import Condition
from longtake.errors import ConfigError
from longtake.plan import Exits, StreamPlan
from longtake.rollout.denoise import DenoisedBlock, Denoiser, commit_block, denoise_block
from longtake.rollout.recache import LatentHistory, recache
from longtake.rollout.replay import ExitStep, Replay
from longtake.rollout.self_forcing import RollOut, RollOutNoise, block_noise_at


@dataclass(frozen=True)
class Picture:
    """Encodings of a picture: its latent [B, 1, C, H, W]; CLIP tokens and `y` where the models take them."""

    latent: Tensor
    tokens: Tensor | None = None
    frames: Tensor | None = None


class Decoder(Protocol):
    """Decodes latents [B, f, C, H, W] that arrive in order to pixels [B, t, 3, h, w] in [-1, 1]."""

    def decode(self, latents: Tensor) -> Tensor: ...


class PictureCodec(Protocol):
    """The encoders, as a long stream needs them."""

    def decoder(self) -> Decoder:
        """A decoder at its beginning."""
        ...

    def encode(self, images: Tensor) -> Picture:
        """Encodings of pictures [B, 3, h, w] in [-1, 1]."""
        ...


@dataclass(frozen=True)
class Window(RollOut):
    """A clip of the teacher's length at the end of a stream, and what the scores are told of it."""

    condition: Condition


@dataclass(frozen=True)
class Switch:
    """The prompt `text` [B, M, D] holds from `frame`, a block boundary, on."""

    frame: int
    text: Tensor


class LongStream:
    """The running videos of one micro-batch.

    Args: `horizon` latent frames of a window (the teacher's length); `spare_frames` that the cache keeps beyond its
    window, for recomputation in backward: the most new frames of a chunk; `history_frames`, for scores in context: a
    later window is then the sink, so many frames before the new ones, and these, with no picture of its own (0: as
    above).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Condition,
        first_latent: Tensor | None,
        plan: StreamPlan,
        latent_size: tuple[int, int],
        codec: PictureCodec,
        *,
        horizon: int,
        max_frames: int,
        spare_frames: int = 0,
        switch: Switch | None = None,
        history_frames: int = 0,
    ) -> None:
        if switch is not None and not plan.is_boundary(switch.frame):
            raise ConfigError(f"a switch at latent frame {switch.frame} is no block boundary")
        self.denoiser, self.condition, self.codec = denoiser, condition, codec
        self.plan = plan = plan.with_given(0 if first_latent is None else first_latent.shape[1])
        self.horizon, self.switch, self.history_frames = horizon, switch, history_frames
        self.kept = LatentHistory(plan)
        self._cache = denoiser.model.new_cache(
            plan, condition.batch_size, latent_size, max_frames=max_frames, spare_frames=spare_frames
        )
        self._decoder = codec.decoder()
        self._started = False
        self._first = None if first_latent is None else first_latent.float()
        # The latest block, if the cache does not hold it yet; and latents that the decoder has not seen.
        self._pending = None if self._first is None else DenoisedBlock.given(self._first)
        self._undecoded: list[Tensor] = [] if self._first is None else [self._first]

    @property
    def position(self) -> int:
        """Latent frames there are, the given picture included."""
        return self.kept.position + (0 if self._pending is None else self._pending.clean.shape[1])

    def advance(
        self, end: int, noise: RollOutNoise, *, exit_step: Exits | None = None, with_grad: bool = False
    ) -> Window:
        """Generates up to latent frame `end` (a block boundary) and returns the window that ends there.

        Args: `noise`, by absolute frames and denoising step; `with_grad` gives new latents with the graph of their exit
        steps, and where the denoiser `replays`, of the context that this call stores (`Replay`). Where the prompt
        switches within the new frames, only those from the switch on are marked as generated and carry gradient. The
        weights may have changed since the last call.
        Raises: ConfigError unless the first call ends at `horizon` and each later one makes fewer frames than that.
        """
        start = self.position
        first = not self._started
        if end != self.horizon if first else not 0 < end - start < self.horizon:
            raise ConfigError(
                f"new frames [{start}, {end}) do not fit windows of horizon={self.horizon} latents: the first call "
                "must end there, each later one must make fewer"
            )
        self._started = True
        self._cache.clear_condition()
        switch = self.switch
        learns_from = switch.frame if switch is not None and start < switch.frame < end else start
        history = self._history() if self.history_frames and not first else None
        new: list[Tensor] = []
        exits: list[ExitStep] = []
        replay = Replay(self.plan, self._cache) if with_grad and self.denoiser.replays else None
        with self.denoiser.gathered():
            for begin, stop in self.plan.blocks(start, end):
                self._settle(begin, noise, replay)
                wanted = with_grad and begin >= learns_from
                block = denoise_block(
                    self.denoiser,
                    self._cache,
                    self.condition,
                    block_noise_at(noise, begin, stop),
                    self.plan,
                    exit_step=exit_step,
                    with_grad=wanted and replay is None,
                    exits=exits if wanted and self.denoiser.batched_exit_backward else None,
                    stores=stop < end,  # the last one is, by the weights of the next call
                )
                new.append(block.clean)
                self._pending = replace(block, clean=block.clean.detach())
                self._undecoded.append(self._pending.clean)
                if wanted and replay is not None:
                    replay.left(begin, block.noisy, block.noisy_sigma)
            if exits:
                new[-len(exits) :] = [self.denoiser.exits_with_grad(self.condition, exits)]
            if replay is not None:
                new[-replay.num_exits :] = [self.denoiser.replayed(self.condition, replay)]
        if history is None:
            return self._window(torch.cat(new, 1), learns_from, first=first)
        begin = learns_from - (start - history.shape[1])
        return Window(torch.cat([history, *new], 1), begin, self.condition)

    def _history(self) -> Tensor:
        """The sink and the latest `history_frames` of what there is, as one clip; nothing will be decoded."""
        self._undecoded.clear()
        blocks, since = list(self.kept.blocks()), self.position - self.history_frames
        if self._pending is not None:
            blocks.append((self.kept.position, self._pending.clean))
        return torch.cat([latents for start, latents in blocks if start < self.plan.sink_frames or start >= since], 1)

    def _settle(self, frame: int, noise: RollOutNoise, replay: Replay | None) -> None:
        """The context of the block that begins at `frame`: commits what is pending, or rebuilds under a new prompt."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self.kept.append(pending.clean)
            if replay is not None:
                replay.stored(pending.context, pending.sigma)
        switches = self.switch is not None and frame >= self.switch.frame
        if pending is not None and not pending.stored and not (switches and self.plan.recache != "none"):
            commit_block(self.denoiser, self._cache, self.condition, pending.context, pending.sigma)
        if self.switch is not None and switches:
            self.condition, self.switch = self.condition.with_text(self.switch.text), None
            if self.plan.recache != "none":
                recache(self.denoiser, self._cache, self.condition, self.kept, noise)
            if replay is not None:
                replay.begin()

    def _window(self, new: Tensor, learns_from: int, *, first: bool) -> Window:
        """The last `horizon` latents as the scores see them; `new` carries the graph."""
        end = self.position
        past = torch.cat(self._undecoded, 1)[:, : -new.shape[1]]  # begins with the first frame not decoded
        begin = learns_from - (end - self.horizon)
        if first:
            return Window(torch.cat([past, new], 1), begin, self.condition)
        clip = torch.cat([past, new], 1)
        # The picture before the window's last horizon - 1 latents; what comes before it is needed by nobody any more.
        seen = clip.shape[1] - (self.horizon - 1)
        with torch.no_grad():
            picture = self.codec.encode(self._decoder.decode(clip[:, :seen].detach())[:, -1])
        self._undecoded = [clip[:, seen:].detach()]
        latents = torch.cat([picture.latent.to(clip.dtype), clip[:, seen:]], 1)
        return Window(latents, begin, Condition(self.condition.text, picture.tokens, picture.frames))
