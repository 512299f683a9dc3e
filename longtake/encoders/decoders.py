"""What decodes in the VAE's place: TAEHV, LightTAE (`tiny`) and LightVAE (`light`), found, loaded strictly, checked.

The keys of TAEHV and LightTAE are the same, and only LightTAE reads latents that are not normalised: the name of the
file decides. The VAE itself (`exact`) still encodes. Must know no transformer.
Source: madebyollin/taehv; lightx2v/Autoencoders on the Hugging Face hub; spec Q.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.encoders.original import load_vae_module
from longtake.encoders.sessions import Decoder, DecoderSession
from longtake.encoders.strict import refuse
from longtake.encoders.tiny import TEMPORAL_STRIDE, TinyNetwork, TinySizes
from longtake.encoders.vae import VideoVAE
from longtake.errors import ConfigError
from longtake.weights.locate import DecoderFile, find_decoder
from longtake.weights.read import read_tensors
from longtake.weights.tensor_files import check_finite, misfits, shapes_in

_PATCHES = {16: 1, 48: 2}  # side of the patches of pixels, by channels of the latents: Wan2.1, Wan2.2
_LIGHT_WIDTH = 24  # LightVAE's, where Wan2.1's VAE has 96
_SPATIAL_STRIDE = 8  # without patches
_OTHER_PARTS = "encoder."  # of the same files; never used


class TinyDecoder:
    """A TAEHV network in the place of a VAE's decoder, behind the same axes.

    Args: `statistics`, mean and std [1, 1, C, 1, 1] of the latents where the network reads them as the VAE has them
    (LightTAE); None: it reads normalised ones (TAEHV).
    """

    def __init__(
        self,
        sizes: TinySizes,
        tensors: Mapping[str, Tensor],
        statistics: tuple[Tensor, Tensor] | None = None,
        *,
        latents_per_call: int = 4,
    ) -> None:
        self.sizes, self.latents_per_call, self.latent_channels = sizes, latents_per_call, sizes.latent_channels
        self.temporal_stride, self.spatial_stride = TEMPORAL_STRIDE, _SPATIAL_STRIDE * sizes.patch_size
        self.network, self._tensors = TinyNetwork(sizes, tensors), tensors
        self._statistics = statistics and tuple(part.to(self.device) for part in statistics)

    @property
    def device(self) -> torch.device:
        return next(iter(self._tensors.values())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self._tensors.values())).dtype

    def tensors(self) -> Mapping[str, Tensor]:
        """The weights by their published names."""
        return self._tensors

    def prepared(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, F, C, H, W] as the network reads them."""
        exact = latents.to(self.device, torch.promote_types(self.dtype, torch.float32))
        if self._statistics is not None:
            mean, std = self._statistics
            exact = exact * std + mean
        return exact.to(self.dtype).permute(0, 1, 3, 4, 2)

    def decoder_session(self) -> DecoderSession:
        """A streaming decoder at the beginning of a video, with its own state."""
        return DecoderSession(self)


def load_decoder(
    kind: str,
    weights: str | Path | None,
    folder: Path,
    vae: VideoVAE,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    latents_per_call: int = 4,
) -> Decoder:
    """The decoder of a kind (`tiny`, `light`) for the latents of `vae`.

    Args: `weights`, its file, or None for the one in `folder` that has a published name.
    Raises: ConfigError when there is none of that kind for these latents; CheckpointError when there is no file, or
    more than one, or it is another one.
    """
    file = find_decoder(kind, weights, folder, vae.latent_channels)
    if kind == "light":
        module = load_vae_module(file.path, device, dtype, any_format=True)
        return checked(VideoVAE(module, latents_per_call=latents_per_call), vae, str(file.path))
    sizes, tensors = _read_tiny(file, vae.latent_channels)
    placed = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    for name, tensor in placed.items():
        check_finite(tensor, f"{name} of {file.path}")
    statistics = vae.statistics if file.reads_denormalised else None
    return checked(TinyDecoder(sizes, placed, statistics, latents_per_call=latents_per_call), vae, str(file.path))


def _read_tiny(file: DecoderFile, latent_channels: int) -> tuple[TinySizes, dict[str, Tensor]]:
    """The decoder's tensors of a TAEHV file. Raises: CheckpointError."""
    sizes = TinySizes(latent_channels, _PATCHES[latent_channels], file.is_super)
    wanted, held = sizes.shapes(), read_tensors(file.path)
    tensors = {name: tensor for name, tensor in held.items() if not name.startswith(_OTHER_PARTS)}
    for name in wanted.keys() & tensors.keys():  # a network trained to grow more frames: the last ones are ours
        if name.endswith(".conv.weight") and tensors[name].shape[1:] == wanted[name][1:]:
            tensors[name] = tensors[name][-wanted[name][0] :]
    refuse(misfits(wanted, shapes_in(tensors)), file.path, f"the TAEHV decoder {file.name}")
    return sizes, tensors


def random_decoder(
    kind: str, vae: VideoVAE, device: torch.device, dtype: torch.dtype, *, latents_per_call: int = 4
) -> Decoder:
    """A decoder of a kind for the latents of `vae`, with random weights. Raises: ConfigError where there is no such."""
    if vae.latent_channels not in _PATCHES or (kind == "light" and vae.latent_channels != 16):
        raise ConfigError(f"decoder={kind} is not published for {vae.latent_channels} latent channels; use exact")
    if kind == "light":
        from diffusers import AutoencoderKLWan

        with torch.device(device):
            module: Any = AutoencoderKLWan(base_dim=_LIGHT_WIDTH)
        return checked(VideoVAE(module.to(dtype), latents_per_call=latents_per_call), vae, "a random LightVAE")
    sizes, tensors = TinySizes(vae.latent_channels, _PATCHES[vae.latent_channels]), {}
    for number, (name, shape) in enumerate(sizes.shapes().items()):
        drawn = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(number))
        tensors[name] = (drawn / (drawn[0].numel() ** 0.5 if drawn.ndim > 1 else 10)).to(dtype)
    return checked(TinyDecoder(sizes, tensors, latents_per_call=latents_per_call), vae, "a random TAEHV")


def checked(decoder: Decoder, vae: VideoVAE, what: str) -> Decoder:
    """The decoder. Raises: ConfigError unless its sizes are those of the VAE whose latents it is to decode."""
    names = ("latent_channels", "temporal_stride", "spatial_stride")
    pairs = {name: (getattr(decoder, name), getattr(vae, name)) for name in names}
    wrong = [f"{name}={own} instead of {its}" for name, (own, its) in pairs.items() if own != its]
    if wrong:
        raise ConfigError(f"{what} does not fit the VAE: {', '.join(wrong)}; use decoder=exact, or that of this VAE")
    return decoder
