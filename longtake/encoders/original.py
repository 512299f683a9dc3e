"""The encoders' original Wan files (`.pth`) as models of transformers and diffusers: key names, sizes, strict loading.

Sizes are read from the shapes in the file; what no shape tells is the published value, which often is the library's
default. Must know no folder layout and no tokenizer.
Source of names and formulas: Wan-Video/Wan2.1 `wan/modules/{t5,clip,vae}.py`, Wan-Video/Wan2.2 `wan/modules/vae2_2.py`
and huggingface/diffusers `scripts/convert_wan_to_diffusers.py`; spec B.1, B.4, C.1 and C.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from longtake.encoders.strict import refuse
from longtake.errors import CheckpointError, ConfigError
from longtake.progress import track
from longtake.weights.file_kind import is_pickled
from longtake.weights.read import read_tensors
from longtake.weights.tensor_files import check_finite, misfits, shapes_in

# Names of the library's modules (regular expressions) -> the original's. What follows a module stays.
_T5 = {
    r"shared|encoder\.embed_tokens": "token_embedding",
    r"encoder\.final_layer_norm": "norm",
    r"encoder\.block\.(\d+)\.layer\.0\.layer_norm": r"blocks.\1.norm1",
    r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])": r"blocks.\1.attn.\2",
    r"encoder\.block\.(\d+)\.layer\.0\..+_attention_bias": r"blocks.\1.pos_embedding.embedding",
    r"encoder\.block\.(\d+)\.layer\.1\.layer_norm": r"blocks.\1.norm2",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0": r"blocks.\1.ffn.gate.0",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1": r"blocks.\1.ffn.fc1",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo": r"blocks.\1.ffn.fc2",
}
_CLIP = {
    r"embeddings\.class_embedding": "visual.cls_embedding",
    r"embeddings\.patch_embedding": "visual.patch_embedding",
    r"embeddings\.position_embedding\.weight": "visual.pos_embedding",
    r"pre_layrnorm": "visual.pre_norm",
    r"post_layernorm": "visual.post_norm",
    r"encoder\.layers\.(\d+)\.layer_norm(\d)": r"visual.transformer.\1.norm\2",
    r"encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj": r"visual.transformer.\1.attn.to_qkv",
    r"encoder\.layers\.(\d+)\.self_attn\.out_proj": r"visual.transformer.\1.attn.proj",
    r"encoder\.layers\.(\d+)\.mlp\.fc1": r"visual.transformer.\1.mlp.0",
    r"encoder\.layers\.(\d+)\.mlp\.fc2": r"visual.transformer.\1.mlp.2",
}
_CLIP_HEADS = 16
_CLIP_OTHER_PARTS = ("textual.", "log_scale", "visual.head")  # the text tower and what joins both
_VAE = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    r"(encoder|decoder)\.conv_in": r"\1.conv1",
    r"(encoder|decoder)\.mid_block\.resnets\.0": r"\1.middle.0",
    r"(encoder|decoder)\.mid_block\.attentions\.0": r"\1.middle.1",
    r"(encoder|decoder)\.mid_block\.resnets\.1": r"\1.middle.2",
    r"(encoder|decoder)\.norm_out": r"\1.head.0",
    r"(encoder|decoder)\.conv_out": r"\1.head.2",
}
# Wan2.1 has one list, where the resampling follows the residuals of a block (3 in each of the decoder's 4) ...
_VAE_FLAT = {
    r"encoder\.down_blocks": "encoder.downsamples",
    **{rf"decoder\.up_blocks\.{b}\.resnets\.{n}": f"decoder.upsamples.{4 * b + n}" for b in range(4) for n in range(3)},
    **{rf"decoder\.up_blocks\.{b}\.upsamplers\.0": f"decoder.upsamples.{4 * b + 3}" for b in range(3)},
}
# ... and Wan2.2 a list in each block (of 2 residuals in the encoder).
_VAE_NESTED = {
    r"encoder\.down_blocks\.(\d)\.resnets": r"encoder.downsamples.\1.downsamples",
    r"encoder\.down_blocks\.(\d)\.downsampler": r"encoder.downsamples.\1.downsamples.2",
    r"decoder\.up_blocks\.(\d)\.resnets": r"decoder.upsamples.\1.upsamples",
    r"decoder\.up_blocks\.(\d)\.upsampler": r"decoder.upsamples.\1.upsamples.3",
}
# What a part of a name inside a residual block of the VAE is called; no other names have such parts.
_INSIDE = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
# Mean and standard deviation of each latent channel, by their number: no weights, and in no file. Those of Wan2.1's 16
# channels are the library's own.
_MEAN_OF_48 = (
    [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891]
    + [0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502]
    + [-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723]
    + [-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667]
)
_STD_OF_48 = (
    [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901]
    + [0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659]
    + [0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944]
    + [0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744]
)
_VAE_STATISTICS = {16: {}, 48: {"latents_mean": _MEAN_OF_48, "latents_std": _STD_OF_48}}
# `AutoencoderKLWan`, whose defaults are Wan2.1's, by channels of the latents
PUBLISHED_VAE: dict[int, dict[str, Any]] = {
    16: {},
    48: {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}
# Library parameters that are one third of a packed original, and originals with axes of size 1 in front
_PACKED = re.compile(r"\.([qkv])_proj\.")
_LEADING = {"visual.cls_embedding": 2, "visual.pos_embedding": 1}


class _Original:
    """The tensors of a `.pth` file, mapped into memory and read only when they are used; nothing is unpickled.

    Args: `skip`, beginnings of the names of tensors that are not wanted; `any_format`, whether it may be safetensors.
    Raises: CheckpointError when the file is missing, damaged, or holds anything but tensors.
    """

    def __init__(self, path: Path, skip: tuple[str, ...] = (), *, any_format: bool = False) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; give an original Wan file or a folder of the library's")
        if not any_format and not is_pickled(path):
            raise CheckpointError(f"{path} is safetensors; original files of Wan's encoders are those of torch.save")
        state = read_tensors(path)
        self.path, self.state = path, {name: value for name, value in state.items() if not name.startswith(skip)}

    def shape(self, key: str, axes: int) -> torch.Size:
        """The shape of a tensor that tells sizes. Raises: CheckpointError when it is missing or has other axes."""
        if key not in self.state or self.state[key].ndim != axes:
            found = f"has shape {tuple(self.state[key].shape)}" if key in self.state else "is missing"
            raise CheckpointError(f"{self.path} is no such encoder of Wan: {key} {found}, and must have {axes} axes")
        return self.state[key].shape

    def count(self, prefix: str) -> int:
        """How many numbered modules follow `prefix`."""
        matches = (re.match(re.escape(prefix) + r"(\d+)\.", key) for key in self.state)
        return max((int(match[1]) + 1 for match in matches if match), default=0)

    def fill(self, model: Any, names: Mapping[str, str], device: torch.device | str, dtype: torch.dtype) -> Any:
        """`model`, built on the meta device, with the tensors of the file, each converted once; in eval mode.

        Raises: CheckpointError that lists missing, surplus and reshaped keys by their original names.
        """
        own = model.state_dict()
        origins = {key: _origin(key, names) for key in own}
        expected: dict[str, tuple[int, ...]] = {}
        for key, source in origins.items():
            first, *rest = own[key].shape
            ones = (1,) * _LEADING.get(source, 0)
            expected[source] = (*ones, 3 * first if _PACKED.search(key) else first, *rest)
        refuse(misfits(expected, shapes_in(self.state)), self.path, type(model).__name__)
        total = sum(self.state[key].nbytes for key in expected)
        told = track(expected, f"loading {self.path.name}", "bytes", total, size=lambda key: self.state[key].nbytes)
        placed = {key: self.state[key].to(device=device, dtype=dtype) for key in told}
        for key, tensor in placed.items():
            check_finite(tensor, f"{key} of {self.path}")
        tensors = {}
        for key, source in origins.items():
            packed = _PACKED.search(key)
            tensor = placed[source].chunk(3)["qkv".index(packed[1])] if packed else placed[source]
            tensors[key] = tensor.reshape(own[key].shape)
        model.load_state_dict(tensors, assign=True)
        return model.eval()


def _origin(key: str, names: Mapping[str, str]) -> str:
    """The original name of a library's parameter."""
    key = key.removeprefix("vision_model.")  # some versions of transformers put CLIP one level deeper
    matches = ((re.match(rf"(?:{module})(?=\.|$)", key), name) for module, name in names.items())
    match, name = next((match, name) for match, name in matches if match)
    inside = [_INSIDE.get(part, part) for part in key[match.end() :].split(".")]
    return match.expand(name) + ".".join(inside)


def load_text_model(path: Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A `UMT5EncoderModel` with the weights of `models_t5_umt5-xxl-enc-bf16.pth`.

    The number of heads is that of the position table [buckets, heads]. Raises: CheckpointError.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    file = _Original(path)
    vocabulary, width = file.shape("token_embedding.weight", 2)
    buckets, heads = file.shape("blocks.0.pos_embedding.embedding.weight", 2)
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=file.shape("blocks.0.attn.q.weight", 2)[0] // heads,
        d_ff=file.shape("blocks.0.ffn.fc1.weight", 2)[0],
        num_layers=file.count("blocks."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        dropout_rate=0.0,
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    file.fill(model, _T5, device, dtype)
    model.set_input_embeddings(model.get_input_embeddings())  # one table under two names
    return model


def load_image_model(path: Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A `CLIPVisionModel` with the vision half of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`.

    The text half is never read from disk. No shape tells the number of heads: it is ViT-H's, 16.
    Raises: CheckpointError.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    file = _Original(path, skip=_CLIP_OTHER_PARTS)
    width, _, patch, _ = file.shape("visual.patch_embedding.weight", 4)
    tokens = file.shape("visual.pos_embedding", 3)[1]
    if width % _CLIP_HEADS:
        raise CheckpointError(f"{path}: the width {width} of the image encoder is no multiple of {_CLIP_HEADS} heads")
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=file.shape("visual.transformer.0.mlp.0.weight", 2)[0],
        num_hidden_layers=file.count("visual.transformer."),
        num_attention_heads=_CLIP_HEADS,
        image_size=patch * math.isqrt(tokens - 1),
        patch_size=patch,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    file.fill(model, _CLIP, device, dtype)
    for module in model.modules():
        if hasattr(module, "position_ids"):  # counted, not stored, and still on the meta device
            module.position_ids = torch.arange(tokens, device=device)[None]
    return model


def load_vae_module(path: Path, device: torch.device | str, dtype: torch.dtype, *, any_format: bool = False) -> Any:
    """An `AutoencoderKLWan` with the weights of `Wan2.1_VAE.pth` or `Wan2.2_VAE.pth`, told apart by their keys.

    Widths and latent channels are those of the file; depth and strides are the published ones. Mean and standard
    deviation of the latents are published for 16 and 48 channels. Args: `any_format`, whether the file may be
    safetensors. Raises: CheckpointError.
    """
    from diffusers import AutoencoderKLWan

    file = _Original(path, any_format=any_format)
    nested = any(key.startswith("encoder.downsamples.0.downsamples.") for key in file.state)
    channels = file.shape("conv2.weight", 5)[0]
    if channels not in _VAE_STATISTICS:
        known = " or ".join(map(str, _VAE_STATISTICS))
        raise CheckpointError(f"{path}: {channels} latent channels, whose mean and std are not published; use {known}")
    width, pixels = file.shape("encoder.conv1.weight", 5)[:2]
    with torch.device("meta"):
        module = AutoencoderKLWan(
            base_dim=width,
            decoder_base_dim=file.shape("decoder.head.0.gamma", 4)[0],
            z_dim=channels,
            is_residual=nested,
            in_channels=pixels,
            out_channels=file.shape("decoder.head.2.weight", 5)[0],
            **({"patch_size": 2, "scale_factor_spatial": 16} if nested else {}),
            **_VAE_STATISTICS[channels],
        )
    return file.fill(module, _VAE | (_VAE_NESTED if nested else _VAE_FLAT), device, dtype)


def random_vae(channels: int, sizes: Mapping[str, Any] = {}) -> Any:
    """The library's VAE with random weights, of these `sizes`, its configuration, or where they are empty that of
    Wan2.1 (16 channels of the latents) or Wan2.2 (48). Raises: ConfigError where there is none of so many.
    """
    from diffusers import AutoencoderKLWan

    if not sizes and channels not in PUBLISHED_VAE:
        raise ConfigError(
            f"no VAE of {channels} latent channels is published, only of {' and '.join(map(str, PUBLISHED_VAE))}"
        )
    return AutoencoderKLWan(**(sizes or PUBLISHED_VAE[channels]))
