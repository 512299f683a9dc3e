"""The video VAE: pixels to normalised latents and back, in one shot or streamed.

Owns the normalisation of latents, sizes, and the past of a stream, which belongs to a session and never to the shared
networks (`wan_vae.py`): any number of sessions and threads can use one `VideoVAE`. Must know no prompt, no mask and no
transformer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.condition import pixel_frames
from longtake.encoders.original import load_vae_module
from longtake.encoders.strict import check_folder, load_strictly
from longtake.encoders.wan_vae import Past, WanDecoder, WanEncoder
from longtake.errors import CheckpointError, ShapeError
from longtake.models.attention import ONE_THREAD

# A guard against searching for ever, not a size of any model: Wan2.1 needs 29.
_MAX_STEADY_INDEX = 512
_THIN = 8  # base width of a network that only its structure matters of


class VideoVAE:
    """A frozen `AutoencoderKLWan` (Wan2.1 or 2.2 layout) behind Longtake's axes.

    Args: `module`, the library class, whose weights are read at the first use; `latents_per_call`, how many latent
    frames go through the network at once (more is faster on a GPU and needs more memory; the result is the same).
    """

    def __init__(self, module: Any, *, latents_per_call: int = 4) -> None:
        if latents_per_call < 1:
            raise ShapeError(f"latents_per_call={latents_per_call} must be at least 1")
        self.module = module.eval().requires_grad_(False)
        self.latents_per_call = latents_per_call
        config = self.module.config
        self.latent_channels: int = config.z_dim
        self.patch_size: int = config.patch_size or 1
        # From the structure, not from `scale_factor_*`: older folders lack these fields and get Wan2.1's values.
        self.temporal_stride: int = 2 ** sum(map(bool, config.temperal_downsample))
        self.spatial_stride: int = 2 ** (len(config.dim_mult) - 1) * self.patch_size
        mean, std = config.latents_mean, config.latents_std
        if len(mean) != self.latent_channels or len(std) != self.latent_channels or min(std) <= 0:
            raise CheckpointError(
                f"the VAE's latents_mean and latents_std have {len(mean)} and {len(std)} entries; "
                f"config.json must give {self.latent_channels} of each, the std positive"
            )
        shape = (1, 1, self.latent_channels, 1, 1)
        self._mean = torch.tensor(mean, dtype=torch.float32, device=self.device).view(shape)
        self._std = torch.tensor(std, dtype=torch.float32, device=self.device).view(shape)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        latents_per_call: int = 4,
    ) -> VideoVAE:
        """The VAE of a library folder (`config.json` and safetensors), or of `Wan2.1_VAE.pth` or `Wan2.2_VAE.pth`.

        Raises: CheckpointError.
        """
        path = Path(folder)
        if path.suffix == ".pth":
            return cls(load_vae_module(path, device, dtype), latents_per_call=latents_per_call)
        from diffusers import AutoencoderKLWan

        module = load_strictly(AutoencoderKLWan, check_folder(path, "VAE"), torch_dtype=dtype)
        return cls(module.to(device), latents_per_call=latents_per_call)

    def copy_to(self, device: torch.device | str) -> VideoVAE:
        """Another one with the same weights, on `device`."""
        return VideoVAE(copy.deepcopy(self.module).to(device), latents_per_call=self.latents_per_call)

    @cached_property
    def encoder(self) -> WanEncoder:
        """The network from pixels to latents."""
        return WanEncoder(self.module)

    @cached_property
    def decoder(self) -> WanDecoder:
        """The network from latents to pixels."""
        return WanDecoder(self.module)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def encode(self, video: Tensor) -> Tensor:
        """Normalised posterior means, float32 [B, F, C, H, W], of a video [B, T, 3, h, w] in [-1, 1].

        Raises: ShapeError unless T is one more than a multiple of the temporal stride.
        Source: Wan2.1; spec B.1: z = (mu - mean) / std.
        """
        self._check_video(video)
        stride, frames = self.temporal_stride, video.shape[1]
        if (frames - 1) % stride:
            below = frames - (frames - 1) % stride
            raise ShapeError(
                f"a video of {frames} frames does not fit latents of {stride} frames; "
                f"cut it to {below} or extend it to {below + stride} frames"
            )
        return self.encoder_session().encode(video)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, float32 [B, T, 3, h, w] in [-1, 1], of normalised latents [B, F, C, H, W]."""
        return self.decoder_session().decode(latents)

    def encoder_session(self) -> EncoderSession:
        """A streaming encoder at the beginning of a video, with its own feature state."""
        return EncoderSession(self)

    def decoder_session(self) -> DecoderSession:
        """A streaming decoder at the beginning of a video, with its own feature state."""
        return DecoderSession(self)

    @cached_property
    def steady_index(self) -> int:
        """Index of the first latent of "one picture, then constant frames" that no longer depends on the picture.

        From it on the latents are constant. Found exactly and without a threshold: NaN in frame 0 marks every latent
        that it can reach, whatever the weights, so that a narrow network of the same structure tells. What lies before
        frame 0 (the padding of causal convolutions) is reached only together with frame 0, so that a latent without NaN
        depends on constant frames alone, like all later ones.
        Raises: CheckpointError when the weights hold NaN, or the dependence does not end.
        """
        if any(bool(parameter.isnan().any()) for parameter in self.module.parameters()):
            raise CheckpointError("the VAE's weights hold NaN: use another VAE")
        size = self.spatial_stride  # one latent pixel: spatial extent changes nothing about time
        # On the CPU: GPU convolutions may transform whole tiles, and then NaN marks more than the frame it came from.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            thin = {"base_dim": _THIN, "decoder_base_dim": _THIN}
            session = VideoVAE(type(self.module).from_config(self.module.config, **thin)).encoder_session()
            session.encode(torch.full((1, 1, 3, size, size), torch.nan))
            grey = torch.zeros(1, self.temporal_stride, 3, size, size)
            for index in range(1, _MAX_STEADY_INDEX):
                if not session.encode(grey).isnan().any():
                    return index
        raise CheckpointError(
            f"the VAE's latents still depend on frame 0 after {_MAX_STEADY_INDEX} latent frames; it is not causal with "
            "finite memory: use another VAE"
        )

    def normalise(self, mu: Tensor) -> Tensor:
        """(mu - mean) / std in float32 (spec B.1)."""
        return (mu.float() - self._mean) / self._std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents.float() * self._std + self._mean

    def run(
        self, network: WanEncoder | WanDecoder, chunks: Sequence[Tensor], past: Past, *, begun: bool
    ) -> tuple[list[Tensor], Past]:
        """What `network` makes of chunks that follow on `past`, and the past after them; `past` stays as it was.

        Args: `begun`, whether there were chunks before.
        """
        made, own = [], None
        # On a GPU attention follows which kernels the process chooses; a trainer's autocast must not reach the network.
        alone = ONE_THREAD if self.device.type == "cuda" else nullcontext()
        with alone, torch.autocast(self.device.type, enabled=False):
            for chunk in chunks:
                out, past = network(chunk, past, first=not begun, into=own)
                made.append(out)
                begun, own = True, past
        return made, past

    def _check_video(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[2] != 3 or not video.is_floating_point():
            raise ShapeError(
                f"a video must be a float tensor [B, T, 3, h, w] in [-1, 1]; got {video.dtype} {tuple(video.shape)}"
            )
        height, width = video.shape[-2:]
        if height % self.spatial_stride or width % self.spatial_stride:
            raise ShapeError(
                f"a video of {height}x{width} pixels needs sides that are multiples of {self.spatial_stride}; crop it"
            )


class EncoderSession:
    """Encodes a video that arrives in pieces of any length; the latents equal those of one call.

    The first frame gives one latent, each further `temporal_stride` frames one more; frames that do not fill a latent
    yet are kept for the next call. A call that raises changes nothing.
    """

    def __init__(self, vae: VideoVAE) -> None:
        self._vae = vae
        self._past: Past = vae.encoder.new_past()
        self._pending: Tensor | None = None
        self.num_latent_frames = 0

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """The latents [B, f, C, H, W] that `video` [B, t, 3, h, w] in [-1, 1] completes; f can be 0."""
        vae = self._vae
        vae._check_video(video)
        frames = video.to(device=vae.device, dtype=vae.dtype)
        if self._pending is not None:
            if self._pending.shape[0] != frames.shape[0] or self._pending.shape[3:] != frames.shape[3:]:
                raise ShapeError(
                    f"this session encodes {_describe(self._pending)}; got {_describe(frames)}: open a new session"
                )
            frames = torch.cat([self._pending, frames], dim=1)
        sizes = self._chunks(frames.shape[1])
        chunks = frames.split([*sizes, frames.shape[1] - sum(sizes)], dim=1)
        latents, past = vae.run(vae.encoder, chunks[:-1], self._past, begun=self.num_latent_frames > 0)
        # An empty remainder is kept as well: it remembers the sizes that later calls must have.
        pending, made = chunks[-1].clone(), self.num_latent_frames + sum(part.shape[1] for part in latents)
        self._pending, self._past, self.num_latent_frames = pending, past, made
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


class DecoderSession:
    """Decodes latents that arrive in pieces of any length; the frames equal those of one call.

    The first latent gives one frame, each later one `temporal_stride` frames. A call that raises changes nothing.
    """

    def __init__(self, vae: VideoVAE) -> None:
        self._vae = vae
        self._past: Past = vae.decoder.new_past()
        self._sizes: tuple[int, ...] | None = None
        self.num_latent_frames = 0

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, float32 [B, t, 3, h, w] in [-1, 1], of the next normalised latents [B, f, C, H, W]."""
        vae = self._vae
        if latents.ndim != 5 or latents.shape[2] != vae.latent_channels:
            raise ShapeError(f"latents must be [B, F, {vae.latent_channels}, H, W]; got {tuple(latents.shape)}")
        sizes = (latents.shape[0], *latents.shape[3:])
        if self._sizes is not None and self._sizes != sizes:
            raise ShapeError(f"this session decodes [B, H, W]={self._sizes}; got {sizes}: open a new session")
        if latents.shape[1] == 0:
            return latents.new_zeros(
                sizes[0], 0, 3, *(n * vae.spatial_stride for n in sizes[1:]), dtype=torch.float32, device=vae.device
            )
        x = vae.denormalise(latents.to(vae.device)).to(vae.dtype).permute(0, 1, 3, 4, 2)
        begun = self.num_latent_frames > 0
        chunks = ([] if begun else [x[:, :1]]) + list(x[:, 0 if begun else 1 :].split(vae.latents_per_call, dim=1))
        frames, past = vae.run(vae.decoder, [chunk for chunk in chunks if chunk.shape[1]], self._past, begun=begun)
        pixels = torch.cat(frames, dim=1).clamp_(-1, 1)
        self._past, self._sizes, self.num_latent_frames = past, sizes, self.num_latent_frames + x.shape[1]
        return pixels

    def copy(self) -> DecoderSession:
        """Another session at the same place; what one decodes does not touch the other."""
        return copy.copy(self)  # `decode` puts others in the place of what it has and changes nothing of it

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where the session stands: tensors by number of their slot, and plain values; `restore` takes both."""
        tensors = {str(slot): kept for slot, kept in enumerate(self._past) if kept is not None}
        sizes = None if self._sizes is None else list(self._sizes)
        return tensors, {"slots": len(self._past), "sizes": sizes, "num_latent_frames": self.num_latent_frames}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Goes on where the session of `state` stood. Raises: CheckpointError for the state of another decoder."""
        past = self._vae.decoder.new_past()
        if values["slots"] != len(past):
            raise CheckpointError(
                f"the state of a decoder with {values['slots']} convolutions was given and this VAE's has {len(past)}; "
                "use the VAE that it was saved with"
            )
        for slot, kept in tensors.items():
            past[int(slot)] = kept.to(self._vae.device, self._vae.dtype)
        self._past = past
        self._sizes = None if values["sizes"] is None else tuple(values["sizes"])
        self.num_latent_frames = values["num_latent_frames"]

    @property
    def num_pixel_frames(self) -> int:
        """Frames given out so far."""
        return pixel_frames(self.num_latent_frames, self._vae.temporal_stride) if self.num_latent_frames else 0


def _describe(frames: Tensor) -> str:
    batch, _, _, height, width = frames.shape
    return f"batches of {batch} videos of {height}x{width} pixels"
