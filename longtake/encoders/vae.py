"""The video VAE: pixels to normalised latents and back, in one shot or streamed.

Owns the normalisation of latents and sizes. The past of a stream belongs to a session (`sessions.py`) and never to the
shared networks (`wan_vae.py`): any number of sessions and threads can use one `VideoVAE`. Must know no prompt, no mask
and no transformer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.encoders.original import load_vae_module
from longtake.encoders.sessions import DecoderSession, EncoderSession
from longtake.encoders.strict import check_folder, load_strictly
from longtake.encoders.wan_vae import WanDecoder, WanEncoder
from longtake.errors import CheckpointError, ShapeError

# A guard against searching for ever, not a size of any model: Wan2.1 needs 29.
_MAX_STEADY_INDEX = 512
_THIN = 8  # base width of a network that only its structure matters of


class VideoVAE:
    """A frozen `AutoencoderKLWan` (Wan2.1 or 2.2 layout) behind Longtake's axes.

    Args: `module`, the library class, whose weights are read at the first use; `latents_per_call`, how many latent
    frames go through the network at once (more is faster on a GPU and needs more memory; the result is the same);
    `low_memory`: one frame at a time at the finest level, and what the encoder remembers lies in this process's memory.
    """

    def __init__(self, module: Any, *, latents_per_call: int = 4, low_memory: bool = False) -> None:
        if latents_per_call < 1:
            raise ShapeError(f"latents_per_call={latents_per_call} must be at least 1")
        self.module = module.eval().requires_grad_(False)
        self.latents_per_call, self.low_memory = latents_per_call, low_memory
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
        low_memory: bool = False,
    ) -> VideoVAE:
        """The VAE of a library folder (`config.json` and safetensors), or of `Wan2.1_VAE.pth` or `Wan2.2_VAE.pth`.

        Raises: CheckpointError.
        """
        path = Path(folder)
        calls: dict[str, Any] = {"latents_per_call": latents_per_call, "low_memory": low_memory}
        if path.suffix == ".pth":
            return cls(load_vae_module(path, device, dtype), **calls)
        from diffusers import AutoencoderKLWan

        module = load_strictly(AutoencoderKLWan, check_folder(path, "VAE"), torch_dtype=dtype)
        return cls(module.to(device), **calls)

    def copy_to(self, device: torch.device | str) -> VideoVAE:
        """Another one with the same weights, on `device`."""
        module = copy.deepcopy(self.module).to(device)
        return VideoVAE(module, latents_per_call=self.latents_per_call, low_memory=self.low_memory)

    def encodes_only(self) -> None:
        """Nobody decodes with it from now on: the weights of its decoder go to this process's memory."""
        self.module.decoder.to("cpu")
        self.__dict__.pop("decoder", None)

    @cached_property
    def encoder(self) -> WanEncoder:
        """The network from pixels to latents."""
        return WanEncoder(self.module, 1 if self.low_memory else None, past_on_host=self.low_memory)

    @cached_property
    def decoder(self) -> WanDecoder:
        """The network from latents to pixels."""
        return WanDecoder(self.module, 1) if self.low_memory else WanDecoder(self.module)

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
        self.check_video(video)
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

    @property
    def network(self) -> WanDecoder:
        """What decodes: `decoder`."""
        return self.decoder

    def prepared(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, F, C, H, W] as `decoder` reads them."""
        return self.denormalise(latents.to(self.device)).to(self.dtype).permute(0, 1, 3, 4, 2)

    def tensors(self) -> Mapping[str, Tensor]:
        """The weights by name."""
        return self.module.state_dict()

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
        sizes = {name: value for name, value in self.module.config.items() if not name.startswith("_")}  # but paths
        thin = {**sizes, "base_dim": _THIN, "decoder_base_dim": _THIN}
        kind: Any = type(self.module)
        return _steady_index(kind, json.dumps(thin, sort_keys=True))

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and std of the latents, [1, 1, C, 1, 1]."""
        return self._mean, self._std

    def normalise(self, mu: Tensor) -> Tensor:
        """(mu - mean) / std in float32 (spec B.1)."""
        return (mu.float() - self._mean) / self._std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents.float() * self._std + self._mean

    def check_video(self, video: Tensor) -> None:
        """Raises ShapeError unless `video` is one that can be encoded."""
        if video.ndim != 5 or video.shape[2] != 3 or not video.is_floating_point():
            raise ShapeError(
                f"a video must be a float tensor [B, T, 3, h, w] in [-1, 1]; got {video.dtype} {tuple(video.shape)}"
            )
        height, width = video.shape[-2:]
        if height % self.spatial_stride or width % self.spatial_stride:
            raise ShapeError(
                f"a video of {height}x{width} pixels needs sides that are multiples of {self.spatial_stride}; crop it"
            )


@lru_cache(maxsize=16)  # a job loads its encoders several times
def _steady_index(kind: Any, config: str) -> int:
    """`VideoVAE.steady_index` of a network of this configuration (JSON); its weights may be any."""
    # On the CPU: GPU convolutions may transform whole tiles, and then NaN marks more than the frame it came from.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), _one_thread():
        vae = VideoVAE(kind.from_config(json.loads(config)))
        session, size = vae.encoder_session(), vae.spatial_stride  # one latent pixel: extent changes nothing about time
        session.encode(torch.full((1, 1, 3, size, size), torch.nan))
        grey = torch.zeros(1, vae.temporal_stride, 3, size, size)
        for index in range(1, _MAX_STEADY_INDEX):
            if not session.encode(grey).isnan().any():
                return index
    raise CheckpointError(
        f"the VAE's latents still depend on frame 0 after {_MAX_STEADY_INDEX} latent frames; it is not causal with "
        "finite memory: use another VAE"
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """In it, many threads do not wait for each other in convolutions of a few numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
