"""The video VAE: pixels to normalised latents and back, in one shot or streamed.

Owns the layout change between `[B, T, 3, h, w]` and the library's `[B, C, T, h, w]`, the normalisation of latents, and
the feature state of streaming, which belongs to a session and never to the shared library module: any number of
sessions and threads can use one `VideoVAE`. Must know no prompt, no mask and no transformer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.condition import pixel_frames
from longtake.encoders.original import load_vae_module
from longtake.encoders.strict import check_folder, load_strictly
from longtake.errors import CheckpointError, ShapeError
from longtake.models.attention import ONE_THREAD

# A guard against searching for ever, not a size of any model: Wan2.1 needs 29.
_MAX_STEADY_INDEX = 512


class VideoVAE:
    """A frozen `AutoencoderKLWan` (Wan2.1 or 2.2 layout) behind Longtake's axes.

    Args: `module`, the library class; `latents_per_call`, how many latent frames go through the network at once (more
    is faster on a GPU and needs more memory; the result is the same).
    """

    def __init__(self, module: Any, *, latents_per_call: int = 1) -> None:
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
        latents_per_call: int = 1,
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
        that it can reach. What lies before frame 0 (the padding of causal convolutions) is reached only together with
        frame 0, so that a latent without NaN depends on constant frames alone, like all later ones.
        Raises: CheckpointError when the dependence does not end, as with NaN in the weights.
        """
        size = self.spatial_stride  # one latent pixel: spatial extent changes nothing about time
        # On the CPU: GPU convolutions may transform whole tiles, and then NaN marks more than the frame it came from.
        vae = self if self.device.type == "cpu" else VideoVAE(copy.deepcopy(self.module).to("cpu").float())
        session = vae.encoder_session()
        session.encode(torch.full((1, 1, 3, size, size), torch.nan))
        grey = torch.zeros(1, self.temporal_stride, 3, size, size)
        for index in range(1, _MAX_STEADY_INDEX):
            if not session.encode(grey).isnan().any():
                return index
        raise CheckpointError(
            f"the VAE's latents still depend on frame 0 after {_MAX_STEADY_INDEX} latent frames; its weights hold NaN "
            "or it is not causal with finite memory: use another VAE"
        )

    def normalise(self, mu: Tensor) -> Tensor:
        """(mu - mean) / std in float32 (spec B.1)."""
        return (mu.float() - self._mean) / self._std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents.float() * self._std + self._mean

    def alone(self) -> AbstractContextManager[Any]:
        """Around what the network does: on a GPU it follows which kernels the process chooses for attention."""
        return ONE_THREAD if self.device.type == "cuda" else nullcontext()

    def new_features(self, network: Any) -> list[Any]:
        """An empty feature list: one slot for each causal convolution of `network`."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        return [None] * sum(isinstance(m, WanCausalConv3d) for m in network.modules())

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
        self._features = vae.new_features(vae.module.encoder)
        self._pending: Tensor | None = None
        self.num_latent_frames = 0

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """The latents [B, f, C, H, W] that `video` [B, t, 3, h, w] in [-1, 1] completes; f can be 0."""
        vae = self._vae
        vae._check_video(video)
        frames = video.to(device=vae.device, dtype=vae.dtype).transpose(1, 2)
        if self._pending is not None:
            if self._pending.shape[0] != frames.shape[0] or self._pending.shape[3:] != frames.shape[3:]:
                raise ShapeError(
                    f"this session encodes {_describe(self._pending)}; got {_describe(frames)}: open a new session"
                )
            frames = torch.cat([self._pending, frames], dim=2)
        latents, used, features = [], 0, list(self._features)
        with (
            vae.alone(),
            torch.autocast(vae.device.type, enabled=False),
        ):  # a trainer's autocast must not reach the encoder
            for size in self._chunks(frames.shape[2]):
                latents.append(self._encode_chunk(frames[:, :, used : used + size], features))
                used += size
        # An empty remainder is kept as well: it remembers the sizes that later calls must have.
        pending, made = frames[:, :, used:].clone(), self.num_latent_frames + sum(part.shape[2] for part in latents)
        self._pending, self._features, self.num_latent_frames = pending, features, made
        if not latents:
            batch, _, _, height, width = frames.shape
            stride = vae.spatial_stride
            return frames.new_zeros(
                batch, 0, vae.latent_channels, height // stride, width // stride, dtype=torch.float32
            )
        return vae.normalise(torch.cat(latents, dim=2).transpose(1, 2))

    def _chunks(self, num_frames: int) -> list[int]:
        """Frames to encode together, in order: one latent first, then at most `latents_per_call`."""
        stride, most = self._vae.temporal_stride, self._vae.latents_per_call
        first = [1] if self.num_latent_frames == 0 and num_frames else []
        whole = (num_frames - len(first)) // stride
        calls = [most] * (whole // most) + ([whole % most] if whole % most else [])
        return first + [n * stride for n in calls]

    def _encode_chunk(self, frames: Tensor, features: list[Any]) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        vae = self._vae
        moments = vae.module.encoder(patchify(frames.contiguous(), vae.patch_size), feat_cache=features, feat_idx=[0])
        return vae.module.quant_conv(moments)[:, : vae.latent_channels]


class DecoderSession:
    """Decodes latents that arrive in pieces of any length; the frames equal those of one call.

    The first latent gives one frame, each later one `temporal_stride` frames. A call that raises changes nothing.
    """

    def __init__(self, vae: VideoVAE) -> None:
        self._vae = vae
        self._features = vae.new_features(vae.module.decoder)
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
        x = vae.denormalise(latents.to(vae.device)).to(vae.dtype).transpose(1, 2)
        # The network puts new tensors into the list and never writes into one.
        frames, start, features = [], 0, list(self._features)
        with vae.alone(), torch.autocast(vae.device.type, enabled=False):
            while start < x.shape[2]:
                first = self.num_latent_frames + start == 0
                size = 1 if first else vae.latents_per_call
                frames.append(self._decode_chunk(x[:, :, start : start + size], features, first=first))
                start += size
        pixels = torch.cat(frames, dim=2).transpose(1, 2).float().clamp(-1, 1)
        made = self.num_latent_frames + x.shape[2]
        self._features, self._sizes, self.num_latent_frames = features, sizes, made
        return pixels

    def _decode_chunk(self, latents: Tensor, features: list[Any], *, first: bool) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        vae = self._vae
        inner = vae.module.post_quant_conv(latents)
        frames = vae.module.decoder(inner, feat_cache=features, feat_idx=[0], first_chunk=first)
        return unpatchify(frames, vae.patch_size)

    def copy(self) -> DecoderSession:
        """Another session at the same place; what one decodes does not touch the other."""
        return copy.copy(self)  # `decode` puts others in the place of what it has and changes nothing of it

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where the session stands: tensors by number of their slot, and plain values; `restore` takes both."""
        tensors = {str(slot): kept for slot, kept in enumerate(self._features) if isinstance(kept, Tensor)}
        marks = [None if isinstance(kept, Tensor) else kept for kept in self._features]
        sizes = None if self._sizes is None else list(self._sizes)
        return tensors, {"marks": marks, "sizes": sizes, "num_latent_frames": self.num_latent_frames}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Goes on where the session of `state` stood. Raises: CheckpointError for the state of another decoder."""
        marks = list(values["marks"])
        if len(marks) != len(self._features):
            raise CheckpointError(
                f"the state of a decoder with {len(marks)} convolutions was given and this VAE's has "
                f"{len(self._features)}; use the VAE that it was saved with"
            )
        for slot, kept in tensors.items():
            marks[int(slot)] = kept.to(self._vae.device, self._vae.dtype)
        self._features = marks
        self._sizes = None if values["sizes"] is None else tuple(values["sizes"])
        self.num_latent_frames = values["num_latent_frames"]

    @property
    def num_pixel_frames(self) -> int:
        """Frames given out so far."""
        return pixel_frames(self.num_latent_frames, self._vae.temporal_stride) if self.num_latent_frames else 0


def _describe(frames: Tensor) -> str:
    batch, _, _, height, width = frames.shape
    return f"batches of {batch} videos of {height}x{width} pixels"
