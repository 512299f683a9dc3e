"""The libraries' own networks and pipelines, called as diffusers calls them: what `longtake verify` compares ours with.

Each function loads what it needs, and lets it go before it returns: never two networks at a time, but for the VAE, with
which a pipeline begins its sampling. Results lie on the CPU. Must know nothing of ours but where files lie and what
their tensors are called.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.condition import pixel_frames
from longtake.encoders.original import load_image_model, load_text_model, load_vae_module
from longtake.encoders.strict import quiet, reading
from longtake.errors import CheckpointError
from longtake.models.dit import parameter_type
from longtake.models.sizes import DiTConfig
from longtake.weights.config_json import FILE, config_to_diffusers, read_json, write_config
from longtake.weights.hub import local_path
from longtake.weights.load import open_dit
from longtake.weights.locate import locate, tokenizer_places

TEXT_LEN = 512  # what diffusers takes for granted: behind so many rows of text the picture's tokens begin
_MOVED_PX = 2  # a frame of the clip from the one before


@dataclass(frozen=True)
class Run:
    """How all of them are computed: the device, and the type of matrix weights."""

    device: torch.device
    dtype: torch.dtype


@contextmanager
def library(what: str) -> Iterator[None]:
    """Around what the libraries do: without gradient, remarks and progress bars; their errors name the part."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with torch.no_grad(), quiet("diffusers", "transformers"), reading(f"the libraries cannot run the {what}"):
        yield


def _pipeline(kind: str = "WanImageToVideoPipeline", **parts: Any) -> Any:
    """A pipeline of diffusers with these parts alone."""
    import diffusers

    names = ["tokenizer", "text_encoder", "vae", "transformer"]
    names += ["image_encoder", "image_processor"] if kind == "WanImageToVideoPipeline" else []
    given = dict.fromkeys(names) | {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()} | parts
    pipeline = getattr(diffusers, kind)(**given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_rows(path: Path, prompts: Sequence[str], text_len: int, run: Run) -> Tensor:
    """Rows [B, M, D] as `encode_prompt` gives them; `path`, a folder of the library or Wan's original file."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    with library("text encoder"):
        place = next(place for place in tokenizer_places(path) if (place / "tokenizer_config.json").is_file())
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
        model: Any
        if path.suffix == ".pth":
            model = load_text_model(path, run.device, run.dtype)
        else:
            model = UMT5EncoderModel.from_pretrained(path, dtype=run.dtype, local_files_only=True)
        rows, _ = _pipeline(tokenizer=tokenizer, text_encoder=model.to(run.device).eval()).encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=text_len, device=run.device
        )
        return rows.float().cpu()


def clip_pixels(path: Path, picture: Tensor, size: int, way: str) -> Tensor:
    """What CLIP is shown [1, 3, size, size] of a picture [1, 3, h, w] in [-1, 1].

    Args: `way`, "diffusers": all of it is the image processor's. "original": the picture is resized as Wan's
    `wan/modules/clip.py` does, and normalised by the image processor. Beside `path` its own numbers may lie.
    """
    from transformers import CLIPImageProcessorPil

    with library("image processor"):
        folder = path.parent / "image_processor"
        square = {"height": size, "width": size}
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
        if (folder / "preprocessor_config.json").is_file():
            processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        if way == "diffusers":
            return processor(images=[_as_pil(picture)], return_tensors="pt").pixel_values
        stretched = F.interpolate(picture.float(), size=(size, size), mode="bicubic", align_corners=False) * 0.5 + 0.5
        mean, std = (
            np.asarray(values, np.float32)[:, None, None] for values in (processor.image_mean, processor.image_std)
        )
        return torch.from_numpy((stretched[0].numpy() - mean) / std)[None]


def _as_pil(picture: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(((picture[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())


class _Prepared:
    """Stands where a pipeline has its image processor, for pixels that are prepared already."""

    def __call__(self, images: Tensor, return_tensors: str) -> Any:
        from transformers import BatchFeature

        return BatchFeature({"pixel_values": images})


def clip_tokens(path: Path, pixels: Tensor, run: Run) -> Tensor:
    """Tokens [1, L, D] of prepared pixels [1, 3, s, s] as `encode_image` gives them."""
    from transformers import CLIPVisionModel

    with library("image encoder"):
        model: Any
        if path.suffix == ".pth":
            model = load_image_model(path, run.device, run.dtype)
        else:
            model = CLIPVisionModel.from_pretrained(path, dtype=run.dtype, local_files_only=True)
        pipeline = _pipeline(image_encoder=model.to(run.device).eval())
        pipeline.image_processor = _Prepared()
        return pipeline.encode_image(pixels.to(run.dtype), run.device).float().cpu()


@dataclass(frozen=True)
class Strides:
    """Pixels and pixel frames of a latent, from a VAE's structure: old configurations do not state them."""

    space: int
    time: int

    @classmethod
    def of(cls, vae: Any) -> Strides:
        """Those of a VAE of diffusers."""
        config = vae.config
        space = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        return cls(space, 2 ** sum(map(bool, config.temperal_downsample)))


def _vae(path: Path, run: Run) -> Any:
    from diffusers import AutoencoderKLWan

    if path.suffix == ".pth":
        return load_vae_module(path, run.device, run.dtype)
    return AutoencoderKLWan.from_pretrained(path, torch_dtype=run.dtype, local_files_only=True).to(run.device).eval()


def _with_strides(pipeline: Any, strides: Strides) -> Any:
    pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal = strides.space, strides.time
    pipeline.video_processor.register_to_config(vae_scale_factor=strides.space)
    return pipeline


@dataclass(frozen=True)
class Coded:
    """A `clip` [1, T, 3, h, w] in [-1, 1] that begins with the picture, its `latents` [1, F, C, H, W], and the `pixels`
    that they are decoded to; `given`, y [1, F, C, H, W], or the latent of the picture alone [1, 1, C, H, W].
    """

    clip: Tensor
    latents: Tensor
    pixels: Tensor
    given: Tensor


def coded(path: Path, picture: Tensor, num_latent_frames: int, run: Run, *, with_y: bool) -> Coded:
    """What the VAE makes of a picture [1, 3, h, w] in [-1, 1] that moves to the right, and `prepare_latents` of it."""
    with library("VAE"):
        vae = _vae(path, run)
        strides = Strides.of(vae)
        frames = pixel_frames(num_latent_frames, strides.time)
        clip = torch.stack([picture.roll(_MOVED_PX * k, -1) for k in range(frames)], 1)
        pipeline = _with_strides(_pipeline(vae=vae, expand_timesteps=not with_y), strides)
        size, channels = picture.shape[-2:], vae.config.z_dim
        prepared = pipeline.prepare_latents(
            picture.to(run.device), 1, channels, *size, frames, torch.float32, run.device
        )
        mean, std = (
            torch.tensor(values, device=run.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        found = vae.encode(clip.transpose(1, 2).to(run.device, run.dtype)).latent_dist.mode()
        pixels = vae.decode(found).sample.float().clamp(-1, 1)
        made = ((found.float() - mean) / std, pixels, prepared[1])
        latents, pixels, given = (value.float().transpose(1, 2).cpu() for value in made)
        return Coded(clip, latents, pixels, given)


def _transformer(source: Path, config: DiTConfig, run: Run) -> Any:
    """diffusers' transformer with the weights of any layout.

    A folder in diffusers' layout it reads alone. Of other files the tensors are given to it under Wan's names, which
    diffusers' own converter renames, so that a name that is wrong in ours shows.
    """
    from diffusers import WanTransformer3DModel

    published, _ = open_dit(source)
    path = locate(local_path(source))
    if path.is_dir() and published.diffusers and "num_attention_heads" in read_json(path / FILE):
        return WanTransformer3DModel.from_pretrained(path, torch_dtype=run.dtype, local_files_only=True).to(run.device)
    state = {name: tensor.to(parameter_type(name, run.dtype), copy=True) for name, tensor in published.read()}
    if "img_emb.emb_pos" in state:  # the converter does not know it
        state["condition_embedder.image_embedder.pos_embed"] = state.pop("img_emb.emb_pos")
    with TemporaryDirectory() as folder:
        write_config(Path(folder), config_to_diffusers(replace(config, text_len=TEXT_LEN)))
        model = WanTransformer3DModel.from_single_file(state, config=folder, torch_dtype=run.dtype)
    if missing := [name for name, value in model.state_dict().items() if value.is_meta]:
        raise CheckpointError(f"diffusers' converter left out {', '.join(missing[:5])}")
    return model.to(run.device)


@dataclass(frozen=True)
class Inputs:
    """What a transformer is called with, on the CPU: `text` [2, M, D] of the prompt and of the empty one, CLIP
    `tokens` [n, L, D] of n pictures, `y` [1, F, C, H, W] or the `first` latent of TI2V [1, 1, C, H, W], each None where
    the kind has none; `noise` [1, F, C, H, W]; `picture` [1, 3, h, w] in [-1, 1].
    """

    text: Tensor
    tokens: Tensor | None
    y: Tensor | None
    first: Tensor | None
    noise: Tensor
    picture: Tensor


@dataclass(frozen=True)
class Sampling:
    """Of a teacher: steps, shift of the noise levels, guidance."""

    steps: int
    shift: float
    guidance: float


def called(
    source: Path,
    vae: Path,
    config: DiTConfig,
    inputs: Inputs,
    noisy: Sequence[tuple[Tensor, float]],
    sampling: Sampling | None,
    run: Run,
    vae_run: Run,
) -> Generator[Tensor]:
    """Yields velocities [1, F, C, H, W] at (latents, level), then latents that the pipeline of this kind sampled (None:
    no clip). The networks are there until it is closed.
    """
    with library("transformer"):
        model = _transformer(source, config, run).eval()
        for x, sigma in noisy:
            yield _velocity(model, inputs, x, sigma, run)
        if sampling is not None:
            yield _sampled(model, _vae(vae, vae_run), inputs, sampling, run)


def _velocity(model: Any, inputs: Inputs, x: Tensor, sigma: float, run: Run) -> Tensor:
    timestep = torch.tensor([1000 * sigma])
    if inputs.first is not None:  # a level a token; the picture's are clean
        rows, columns = (side // patch for side, patch in zip(x.shape[-2:], model.config.patch_size[1:]))
        levels = torch.full((1, x.shape[1]), 1000 * sigma)
        levels[:, 0] = 0
        x, timestep = torch.cat([inputs.first, x[:, 1:]], 1), levels.repeat_interleave(rows * columns, 1)
    hidden = x if inputs.y is None else torch.cat([x, inputs.y], 2)
    tokens = None if inputs.tokens is None else inputs.tokens.to(run.device, run.dtype)
    (out,) = model(
        hidden_states=hidden.transpose(1, 2).to(run.device, run.dtype),
        timestep=timestep.to(run.device),
        encoder_hidden_states=inputs.text[:1].to(run.device, run.dtype),
        encoder_hidden_states_image=tokens,
        return_dict=False,
    )
    return out.float().transpose(1, 2).cpu()


def _sampled(model: Any, vae: Any, inputs: Inputs, sampling: Sampling, run: Run) -> Tensor:
    """What the pipeline makes of the noise, through Euler steps over evenly spaced levels, shifted by its scheduler."""
    text, strides, size = inputs.text.to(run.device), Strides.of(vae), inputs.picture.shape[-2:]
    common: dict[str, Any] = {
        "prompt_embeds": text[:1],
        "negative_prompt_embeds": text[1:],
        "latents": inputs.noise.transpose(1, 2),
        "height": size[0],
        "width": size[1],
        "num_frames": pixel_frames(inputs.noise.shape[1], strides.time),
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "output_type": "latent",
    }
    if inputs.y is None and inputs.first is None:
        pipeline = _pipeline("WanPipeline", transformer=model, vae=vae, scheduler=_scheduler(sampling))
        clip = _with_strides(pipeline, strides)(**common).frames
    else:
        pipeline = _pipeline(
            transformer=model, vae=vae, scheduler=_scheduler(sampling), expand_timesteps=inputs.first is not None
        )
        if inputs.tokens is not None:  # they were compared before; the image encoder need not come again
            pipeline.encode_image = _given(inputs.tokens.to(run.device))
        clip = _with_strides(pipeline, strides)(image=(inputs.picture + 1) / 2, **common).frames
    return clip.float().transpose(1, 2).cpu()


def _given(tokens: Tensor) -> Callable[..., Tensor]:
    return lambda _image, _device=None: tokens


def _scheduler(sampling: Sampling) -> Any:
    """diffusers' Euler over 1, 1 - 1/n, ..., 1/n, which it shifts itself."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Even(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
            levels = [1 - k / num_inference_steps for k in range(num_inference_steps)]
            super().set_timesteps(sigmas=levels, device=device)  # type: ignore[misc]

    return Even(shift=sampling.shift)
