"""Videos that are encoded or decoded in pieces: what a session remembers, and what becomes of it when a call fails.

A network's past takes up to a gigabyte at full size, so there is one of it and each call overwrites it. A decoder's
is a function of the latest latents, which are small and kept: where a call failed, or another copy of the session went
on, it is made anew from them, bit for bit. Must know no statistics of latents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from longtake.condition import pixel_frames
from longtake.encoders.past import Past
from longtake.errors import CheckpointError, ShapeError
from longtake.models.attention import ONE_THREAD


class Network(Protocol):
    """A network of a video VAE whose past goes in and comes out."""

    def new_past(self) -> list[Tensor | None]: ...
    def __call__(
        self, x: Tensor, past: Past, /, *, first: bool, into: Past | None = None
    ) -> tuple[Tensor, list[Tensor | None]]: ...


class DecoderNetwork(Network, Protocol):
    """One that decodes; `reach`: how many latent frames before its own a frame depends on, at the most."""

    @property
    def reach(self) -> int: ...


class Sizes(Protocol):
    """Sizes of latents, where they are worked on, and how many latent frames at a time."""

    latents_per_call: int
    latent_channels: int
    temporal_stride: int
    spatial_stride: int

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...


class Encoder(Sizes, Protocol):
    """What makes normalised latents of pixels."""

    @property
    def encoder(self) -> Network: ...
    def check_video(self, video: Tensor) -> None: ...
    def normalise(self, mu: Tensor) -> Tensor: ...


class Decoder(Sizes, Protocol):
    """What makes pixels of normalised latents: the VAE, or what is decoded with in its place."""

    @property
    def network(self) -> DecoderNetwork: ...
    def prepared(self, latents: Tensor) -> Tensor: ...
    def tensors(self) -> Mapping[str, Tensor]: ...
    def decoder_session(self) -> DecoderSession: ...


def run(network: Network, chunks: Sequence[Tensor], past: Past, *, begun: bool) -> tuple[list[Tensor], Past]:
    """What `network` makes of chunks that follow on `past`, and the past after them, which takes its place.

    Args: `begun`, whether there were chunks before.
    """
    made = []
    for chunk in chunks:
        # On a GPU attention follows which kernels the process chooses; a trainer's autocast must not reach the network.
        alone = ONE_THREAD if chunk.device.type == "cuda" else nullcontext()
        with alone, torch.autocast(chunk.device.type, enabled=False):
            out, past = network(chunk, past, first=not begun, into=past)
        made.append(out)
        begun = True
    return made, past


class EncoderSession:
    """Encodes a video that arrives in pieces of any length; the latents equal those of one call.

    The first frame gives one latent, each further `temporal_stride` frames one more; frames that do not fill a latent
    yet are kept for the next call. A call that is refused changes nothing; one that fails in its work ends the session.
    """

    def __init__(self, vae: Encoder) -> None:
        self._vae = vae
        self._past: Past | None = vae.encoder.new_past()
        self._pending: Tensor | None = None
        self.num_latent_frames = 0

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """The latents [B, f, C, H, W] that `video` [B, t, 3, h, w] in [-1, 1] completes; f can be 0."""
        vae, past = self._vae, self._past
        vae.check_video(video)
        assert past is not None, "an encoder session whose call failed is used again"
        frames = video.to(device=vae.device, dtype=vae.dtype)
        if self._pending is not None:
            if self._pending.shape[0] != frames.shape[0] or self._pending.shape[3:] != frames.shape[3:]:
                raise ShapeError(
                    f"this session encodes {_describe(self._pending)}; got {_describe(frames)}: open a new session"
                )
            frames = torch.cat([self._pending, frames], dim=1)
        sizes = self._chunks(frames.shape[1])
        chunks = frames.split([*sizes, frames.shape[1] - sum(sizes)], dim=1)
        self._past = None  # until all of it is that of the next call
        latents, past = run(vae.encoder, chunks[:-1], past, begun=self.num_latent_frames > 0)
        # An empty remainder is kept as well: it remembers the sizes that later calls must have.
        pending, made = chunks[-1].clone(), self.num_latent_frames + sum(part.shape[1] for part in latents)
        self._pending, self.num_latent_frames, self._past = pending, made, past
        if not latents:
            batch, _, _, height, width = frames.shape
            stride = vae.spatial_stride
            return frames.new_zeros(
                batch, 0, vae.latent_channels, height // stride, width // stride, dtype=torch.float32
            )
        return vae.normalise(torch.cat(latents, dim=1).permute(0, 1, 4, 2, 3)).contiguous()

    def _chunks(self, num_frames: int) -> list[int]:
        """Frames to encode together, in order: one latent first, then at most `latents_per_call`."""
        stride, most = self._vae.temporal_stride, self._vae.latents_per_call
        first = [1] if self.num_latent_frames == 0 and num_frames else []
        whole = (num_frames - len(first)) // stride
        calls = [most] * (whole // most) + ([whole % most] if whole % most else [])
        return first + [n * stride for n in calls]


class _Held:
    """A decoder's past and after how many latent frames of the video it is, None while it is written. Copies of a
    session share one: whose latent frames are others makes its own. `apart`: never written,
    and maybe elsewhere.
    """

    def __init__(self, past: Past, after: int | None = None, *, apart: bool = False) -> None:
        self.past, self.after, self.apart = past, after, apart


class DecoderSession:
    """Decodes latents that arrive in pieces of any length; the frames equal those of one call.

    The first latent gives one frame, each later one `temporal_stride` frames. A call that raises changes nothing.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._held = _Held(decoder.network.new_past(), 0)
        self._recent: tuple[Tensor, ...] = ()  # normalised latents as they went through the network, the latest last
        self._sizes: tuple[int, ...] | None = None
        self.num_latent_frames = 0

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, float32 [B, t, 3, h, w] in [-1, 1], of the next normalised latents [B, f, C, H, W]."""
        decoder = self._decoder
        if latents.ndim != 5 or latents.shape[2] != decoder.latent_channels:
            raise ShapeError(f"latents must be [B, F, {decoder.latent_channels}, H, W]; got {tuple(latents.shape)}")
        sizes = (latents.shape[0], *latents.shape[3:])
        if self._sizes is not None and self._sizes != sizes:
            raise ShapeError(f"this session decodes [B, H, W]={self._sizes}; got {sizes}: open a new session")
        if latents.shape[1] == 0:
            size = [n * decoder.spatial_stride for n in sizes[1:]]
            return latents.new_zeros(sizes[0], 0, 3, *size, dtype=torch.float32, device=decoder.device)
        before, chunks = self.num_latent_frames, self._chunks(latents)
        held = self._own()
        held.after = None  # until all of it is that of the next call
        frames, held.past = run(decoder.network, [decoder.prepared(x) for x in chunks], held.past, begun=before > 0)
        pixels = torch.cat(frames, dim=1).clamp_(-1, 1)
        held.after = before + latents.shape[1]
        self._recent, self._sizes, self.num_latent_frames = self._later(chunks), sizes, held.after
        return pixels

    def _chunks(self, latents: Tensor) -> list[Tensor]:
        """What goes through the network together: a video's first latent frame alone, then `latents_per_call`."""
        first = 0 if self.num_latent_frames else 1
        rest = latents[:, first:].split(self._decoder.latents_per_call, dim=1)
        # Copies: what was given may be overwritten, or be a part of much more.
        return [chunk.clone() for chunk in (latents[:, :first], *rest) if chunk.shape[1]]

    def _later(self, chunks: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The latest latents with `chunks` after them: as few as the past depends on."""
        recent, reach = [*self._recent, *chunks], self._decoder.network.reach
        while sum(chunk.shape[1] for chunk in recent[1:]) >= reach:
            recent.pop(0)
        return tuple(recent)

    def _own(self) -> _Held:
        """The past after this session's latent frames."""
        if self._held.after != self.num_latent_frames:
            network = self._decoder.network
            self._held = _Held(network.new_past())  # the other one is free before this one is made
            begun = self.num_latent_frames > sum(chunk.shape[1] for chunk in self._recent)
            past: Past = self._held.past
            for chunk in self._recent:  # as they were decoded, so that the numbers are the same bit for bit
                _, past = run(network, [self._decoder.prepared(chunk)], past, begun=begun)
                begun = True
            self._held.past, self._held.after = past, self.num_latent_frames
        elif self._held.apart:
            device = self._decoder.device
            past = [None if kept is None else kept.to(device, copy=True) for kept in self._held.past]
            self._held = _Held(past, self.num_latent_frames)
        return self._held

    def copy(self) -> DecoderSession:
        """Another session at the same place; what one decodes does not touch the other.

        The one that decodes first goes on with the past that there is, the other makes it anew.
        """
        return copy.copy(self)

    def fork(self) -> DecoderSession:
        """As `copy`, with a past of its own, so that neither has anything to make anew."""
        other, held = self.copy(), self._held
        if held.after == self.num_latent_frames and not held.apart:
            other._held = _Held([None if kept is None else kept.clone() for kept in held.past], held.after)
        elif held.after != self.num_latent_frames:
            other._held = _Held(())
        return other

    def put_by(self, copy_of: Callable[[Tensor], Tensor]) -> None:
        """Leaves the past to the copy of this session that goes on, and keeps one of its own that `copy_of` makes, e.g.
        in another memory. Nothing is to be made anew then.
        """
        held = self._held
        if held.after == self.num_latent_frames and not held.apart:
            past = [None if kept is None else copy_of(kept) for kept in held.past]
            self._held = _Held(past, held.after, apart=True)

    @property
    def put_by_bytes(self) -> int:
        """What `put_by` keeps."""
        past = self._held.past if self._held.apart else []
        return sum(kept.numel() * kept.element_size() for kept in past if kept is not None)

    def release(self) -> None:
        """Gives back the past; it is made anew where it is needed again."""
        self._held = _Held(())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where the session stands: tensors by number, and plain values; `restore` takes both."""
        sizes = None if self._sizes is None else list(self._sizes)
        recent = {str(number): chunk for number, chunk in enumerate(self._recent)}
        reach = self._decoder.network.reach
        return recent, {"reach": reach, "sizes": sizes, "num_latent_frames": self.num_latent_frames}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Goes on where the session of `state` stood. Raises: CheckpointError for the state of another decoder."""
        if values["reach"] != self._decoder.network.reach:
            raise CheckpointError(
                f"the state of a decoder that looks back {values['reach']} latent frames was given and this one looks "
                f"back {self._decoder.network.reach}; use the decoder that it was saved with"
            )
        self._recent = tuple(tensors[str(number)] for number in range(len(tensors)))
        self._sizes = None if values["sizes"] is None else tuple(values["sizes"])
        self.num_latent_frames = values["num_latent_frames"]
        if self._recent:
            self._held = _Held(())

    @property
    def num_pixel_frames(self) -> int:
        """Frames given out so far."""
        return pixel_frames(self.num_latent_frames, self._decoder.temporal_stride) if self.num_latent_frames else 0


def _describe(frames: Tensor) -> str:
    batch, _, _, height, width = frames.shape
    return f"batches of {batch} videos of {height}x{width} pixels"
