"""Networks of a preset's sizes with random weights, drawn on the device: no file is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.bench.clock import synchronize
from longtake.config.generation import GenerationConfig
from longtake.config.stage import TOY, TOY_ASSETS
from longtake.doctor.estimate import SizedBuilder
from longtake.encoders.bundle import Encoders, vae_calls
from longtake.encoders.clip import ImageEncoder
from longtake.encoders.decoders import random_decoder
from longtake.encoders.original import random_vae
from longtake.encoders.sessions import Decoder
from longtake.encoders.text import TextEncoder
from longtake.encoders.vae import VideoVAE
from longtake.inference.generator import Generator
from longtake.inference.pipeline import decoding_place, streaming_model
from longtake.models.dit import VideoDiT
from longtake.models.sequence_parallel import SequenceParallel
from longtake.models.sizes import DiTConfig
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser
from longtake.weights.load import Opened
from longtake.weights.presets import model_config
from longtake.weights.two_networks import Part

# The encoders of every published Wan model. Source: specification A.1, B, C.
_TEXT: dict[str, Any] = {"vocab_size": 256384, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_SMALL_TEXT: dict[str, Any] = {"vocab_size": 256, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
_IMAGE: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


def random_settings(preset: str, changes: Mapping[str, Any]) -> GenerationConfig:
    """The defaults of generation, for the toy those of its recipes, with `changes` on top. Raises: ConfigError."""
    plan = {"block_frames": 4, "window_frames": 9, "sink_frames": 1}
    defaults = GenerationConfig.model_fields["plan"].default.model_dump()
    tree: dict[str, Any] = {"height": 64, "width": 64, "plan": plan} if preset == TOY else {"plan": defaults}
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) else value
    return GenerationConfig.from_tree(tree)


def random_generator(
    preset: str,
    settings: GenerationConfig,
    device: torch.device,
    *,
    small_text: bool = False,
    split: SequenceParallel | None = None,
    decode_device: str | None = None,
) -> Generator:
    """A generator of a preset's sizes. Args: `small_text`, a text encoder of one layer in umT5's place (11 GB less);
    `split` and `decode_device` as in `Generator.build`.

    Raises: ConfigError listing the known presets, for a size that the VAE does not take, and as `decoding_place`.
    """
    sizes, decoding = model_config(preset), decoding_place(decode_device, split)
    settings.shape(4, sizes.vae_stride)
    torch.manual_seed(0)  # the same encoders on every rank
    model = streaming_model(random_weights(sizes, device), device, settings, split)
    dtype = torch.bfloat16 if settings.is_half else torch.float32
    vae_dtype = torch.bfloat16 if settings.has_half_vae else torch.float32
    encoders = Encoders.load(TOY_ASSETS) if preset == TOY else _encoders(sizes, device, dtype, small_text=small_text)
    graphs = CUDAGraphRunner() if device.type == "cuda" else None
    encoders, kind = _moved(encoders, device, vae_dtype, low_memory=settings.low_memory), settings.decoder
    decoder: Decoder | None = None if decoding is None else encoders.vae.copy_to(decoding)
    if kind != "exact":
        calls = vae_calls(low_memory=settings.low_memory)["latents_per_call"]
        decoder = random_decoder(kind, encoders.vae, decoding or device, vae_dtype, latents_per_call=calls)
        encoders.vae.encodes_only()
    made = Generator(Denoiser(model, graphs=graphs), encoders, settings, device, decoder=decoder)
    synchronize(device)
    return made


def random_weights(sizes: DiTConfig, device: torch.device, seed: int = 0) -> Opened:
    """Random weights of these sizes, drawn where they are wanted, one after the other."""
    with torch.device("meta"):
        model = VideoDiT(sizes)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def read(names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        wanted = None if names is None else set(names)
        for number, (name, shape) in enumerate(shapes.items()):
            if wanted is None or name in wanted:
                generator = torch.Generator(device).manual_seed(1000 * seed + number)
                value = torch.randn(shape, device=device, generator=generator)
                if "norm" in name and name.endswith("weight"):
                    yield name, value.mul_(0.1).add_(1)
                elif value.ndim > 1 and "modulation" not in name:
                    yield name, value.div_(value[0].numel() ** 0.5)
                else:
                    yield name, value.mul_(0.1)

    return Opened(model, read, str)


@dataclass(kw_only=True)
class RandomBuilder(SizedBuilder):
    """The networks of a stage as a training builds them, of given sizes and with random weights."""

    def open(self, source: Path, part: Part = "alone") -> Opened:
        """Weights of that name."""
        return random_weights(self.sizes[source.name], self.mesh.device, sorted(self.sizes).index(source.name))


def _encoders(sizes: DiTConfig, device: torch.device, dtype: torch.dtype, *, small_text: bool) -> Encoders:
    from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    text_sizes = _SMALL_TEXT if small_text else _TEXT
    text_config = UMT5Config(d_model=sizes.text_dim, pad_token_id=0, eos_token_id=1, dropout_rate=0.0, **text_sizes)
    # The real one is a file; a text costs the same whatever its words.
    tokenizer = AutoTokenizer.from_pretrained(TOY_ASSETS / "text_encoder", model_max_length=sizes.text_len)
    image = None
    with torch.device(device):
        text = UMT5EncoderModel._from_config(text_config, dtype=dtype)
        vae = random_vae(sizes.out_channels)
        if sizes.image_dim is not None:
            image = ImageEncoder(CLIPVisionModel._from_config(CLIPVisionConfig(**_IMAGE), dtype=dtype))
    return Encoders(VideoVAE(vae), TextEncoder(text, tokenizer, sizes.text_len), image)


def _moved(encoders: Encoders, device: torch.device, vae_dtype: torch.dtype, *, low_memory: bool) -> Encoders:
    for network in (encoders.text.model, None if encoders.image is None else encoders.image.model):
        if network is not None:
            network.to(device)
    vae = VideoVAE(encoders.vae.module.to(device, vae_dtype), **vae_calls(low_memory=low_memory))
    moved = Encoders(vae, encoders.text, encoders.image)
    if low_memory:
        moved.offload(device)
    return moved
