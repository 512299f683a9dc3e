"""The encoders' original Wan files (`.pth`) as models of transformers and diffusers: key names, sizes, strict loading.

Sizes are read from the shapes in the file; what no shape tells is the published value. Must know no folder layout and
no tokenizer.
Source of names and formulas: Wan-Video/Wan2.1 `wan/modules/{t5,clip,vae}.py`, Wan-Video/Wan2.2 `wan/modules/vae2_2.py`
and huggingface/diffusers `scripts/convert_wan_to_diffusers.py`; spec B.1, B.4, C.1 and C.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from longtake.encoders.strict import check_keys
from longtake.errors import CheckpointError
from longtake.weights.file_kind import is_pickled
from longtake.weights.read import read_pickled
from longtake.weights.tensor_files import check_finite

if TYPE_CHECKING:
    from torch import Tensor

_T5_MAX_DISTANCE = 128
_CLIP_HEADS = 16
_CLIP_OTHER_PARTS = ("textual.", "log_scale", "visual.head")  # the text tower and what joins both
_VAE_MULTIPLIERS = [1, 2, 4, 4]  # of the width, a block each
_VAE_RES_BLOCKS = 2  # in a block of the encoder; the decoder has one more
_VAE_TEMPORAL = [False, True, True]  # which of the encoder's blocks halve the frames
# Mean and standard deviation of each latent channel: no weights, and in no file; by the number of channels.
_VAE_STATISTICS = {
    16: (
        [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
        + [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
        [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
        + [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160],
    ),
    48: (
        [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891]
        + [0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502]
        + [-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723]
        + [-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
        [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901]
        + [0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659]
        + [0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944]
        + [0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744],
    ),
}


class _Origin(NamedTuple):
    """Where a library parameter comes from: an original key, or one third (0 q, 1 k, 2 v) of a packed one.

    `leading` counts the axes of size 1 that the original has in front.
    """

    key: str
    third: int | None = None
    leading: int = 0


# ---- reading --------------------------------------------------------------------------------------------------------
def read_original(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` file, mapped into memory and read only when they are used; nothing is unpickled.

    Raises: CheckpointError when the file is missing, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give an original Wan file or a folder in the library's format")
    if not is_pickled(path):
        raise CheckpointError(f"{path} is safetensors; original files of Wan's encoders are those of torch.save")
    state = dict(read_pickled(path))
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds something else than tensors by name; it is no original Wan encoder")
    return state


def _shape(state: Mapping[str, Tensor], key: str, axes: int, path: Path) -> torch.Size:
    """The shape of a tensor that tells sizes. Raises: CheckpointError when it is missing or has other axes."""
    if key not in state or state[key].ndim != axes:
        found = f"has shape {tuple(state[key].shape)}" if key in state else "is missing"
        raise CheckpointError(f"{path} is no such encoder of Wan: {key} {found}, and must have {axes} axes")
    return state[key].shape


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules follow `prefix`."""
    numbers = {int(match[1]) for key in state if (match := re.match(re.escape(prefix) + r"(\d+)\.", key))}
    return max(numbers) + 1 if numbers else 0


def _fill(
    model: Any,
    origin: Callable[[str], _Origin],
    state: Mapping[str, Tensor],
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Any:
    """`model`, built on the meta device, with the tensors of `state`, each converted once.

    Raises: CheckpointError that lists missing, surplus and reshaped keys by their original names.
    """
    own = model.state_dict()
    origins = {key: origin(key) for key in own}
    expected: dict[str, tuple[int, ...]] = {}
    for key, (source, third, leading) in origins.items():
        first, *rest = own[key].shape
        expected[source] = (1,) * leading + (first if third is None else 3 * first, *rest)
    check_keys(expected, {key: tuple(tensor.shape) for key, tensor in state.items()}, path, type(model).__name__)
    placed = {key: state[key].to(device=device, dtype=dtype) for key in expected}
    for key, tensor in placed.items():
        check_finite(tensor, f"{key} of {path}")
    tensors = {}
    for key, (source, third, _) in origins.items():
        tensor = placed[source] if third is None else placed[source].chunk(3)[third]
        tensors[key] = tensor.reshape(own[key].shape)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


# ---- umT5 -----------------------------------------------------------------------------------------------------------
_T5_BLOCK = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}


def _t5_origin(key: str) -> _Origin:
    if match := re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", key):
        return _Origin(f"blocks.{match[1]}.{_T5_BLOCK[match[2]]}.weight")
    return _Origin("norm.weight" if key == "encoder.final_layer_norm.weight" else "token_embedding.weight")


def load_text_model(path: Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A `UMT5EncoderModel` with the weights of `models_t5_umt5-xxl-enc-bf16.pth`.

    The number of heads is that of the position table [buckets, heads]. Raises: CheckpointError.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    state = read_original(path)
    vocabulary, width = _shape(state, "token_embedding.weight", 2, path)
    inner, _ = _shape(state, "blocks.0.attn.q.weight", 2, path)
    buckets, heads = _shape(state, "blocks.0.pos_embedding.embedding.weight", 2, path)
    hidden, _ = _shape(state, "blocks.0.ffn.fc1.weight", 2, path)
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=hidden,
        num_layers=_count(state, "blocks."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=_T5_MAX_DISTANCE,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    _fill(model, _t5_origin, state, path, device, dtype)
    model.set_input_embeddings(model.get_input_embeddings())  # one table under two names
    return model


# ---- CLIP -----------------------------------------------------------------------------------------------------------
_CLIP_TOP = {
    "embeddings.class_embedding": _Origin("visual.cls_embedding", leading=2),
    "embeddings.patch_embedding.weight": _Origin("visual.patch_embedding.weight"),
    "embeddings.position_embedding.weight": _Origin("visual.pos_embedding", leading=1),
    **{f"pre_layrnorm.{leaf}": _Origin(f"visual.pre_norm.{leaf}") for leaf in ("weight", "bias")},
    **{f"post_layernorm.{leaf}": _Origin(f"visual.post_norm.{leaf}") for leaf in ("weight", "bias")},
}
_CLIP_BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
_CLIP_PACKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _clip_origin(key: str) -> _Origin:
    key = key.removeprefix("vision_model.")  # some versions of transformers put the model one level deeper
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if match is None:
        return _CLIP_TOP[key]
    block, module, leaf = f"visual.transformer.{match[1]}", match[2], match[3]
    if module in _CLIP_PACKED:
        return _Origin(f"{block}.attn.to_qkv.{leaf}", third=_CLIP_PACKED.index(module))
    return _Origin(f"{block}.{_CLIP_BLOCK[module]}.{leaf}")


def load_image_model(path: Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A `CLIPVisionModel` with the vision half of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`.

    The text half is never read from disk. No shape tells the number of heads: it is ViT-H's, 16.
    Raises: CheckpointError.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    state = {key: value for key, value in read_original(path).items() if not key.startswith(_CLIP_OTHER_PARTS)}
    width, _, patch, _ = _shape(state, "visual.patch_embedding.weight", 4, path)
    tokens = _shape(state, "visual.pos_embedding", 3, path)[1]
    hidden, _ = _shape(state, "visual.transformer.0.mlp.0.weight", 2, path)
    if width % _CLIP_HEADS:
        raise CheckpointError(f"{path}: the width {width} of the image encoder is no multiple of {_CLIP_HEADS} heads")
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=_count(state, "visual.transformer."),
        num_attention_heads=_CLIP_HEADS,
        image_size=patch * math.isqrt(tokens - 1),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    _fill(model, _clip_origin, state, path, device, dtype)
    for module in model.modules():
        if hasattr(module, "position_ids"):  # counted, not stored, and still on the meta device
            module.position_ids = torch.arange(tokens, device=device)[None]
    return model


# ---- VAE ------------------------------------------------------------------------------------------------------------
_VAE_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def _vae_places(nested: bool) -> dict[str, str]:
    """Original names of the library's modules, without what lies inside a residual block.

    Wan2.2 (`nested`) has a list in each block; Wan2.1 has one list, where the resampling follows a block's residuals.
    """
    places = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
    for half in ("encoder", "decoder"):
        places |= {f"{half}.conv_in": f"{half}.conv1", f"{half}.mid_block.attentions.0": f"{half}.middle.1"}
        places |= {f"{half}.norm_out": f"{half}.head.0", f"{half}.conv_out": f"{half}.head.2"}
        places |= {f"{half}.mid_block.resnets.{n}": f"{half}.middle.{2 * n}" for n in range(2)}
    down, up = _VAE_RES_BLOCKS, _VAE_RES_BLOCKS + 1
    for block in range(len(_VAE_MULTIPLIERS)):
        inner, outer = f"encoder.down_blocks.{block}", f"decoder.up_blocks.{block}"
        if nested:
            places |= {f"{inner}.resnets.{n}": f"encoder.downsamples.{block}.downsamples.{n}" for n in range(down)}
            places |= {f"{outer}.resnets.{n}": f"decoder.upsamples.{block}.upsamples.{n}" for n in range(up)}
            places[f"{inner}.downsampler"] = f"encoder.downsamples.{block}.downsamples.{down}"
            places[f"{outer}.upsampler"] = f"decoder.upsamples.{block}.upsamples.{up}"
        else:
            for n in range(block * (down + 1), (block + 1) * (down + 1)):
                places[f"encoder.down_blocks.{n}"] = f"encoder.downsamples.{n}"
            places |= {f"{outer}.resnets.{n}": f"decoder.upsamples.{block * (up + 1) + n}" for n in range(up)}
            places[f"{outer}.upsamplers.0"] = f"decoder.upsamples.{block * (up + 1) + up}"
    return places


def _vae_origin(key: str, places: Mapping[str, str]) -> _Origin:
    parts = key.split(".")
    cut = next(n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in places)
    inside = [_VAE_RESIDUAL.get(part, part) for part in parts[cut:]]
    return _Origin(".".join([places[".".join(parts[:cut])], *inside]))


def load_vae_module(path: Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    """An `AutoencoderKLWan` with the weights of `Wan2.1_VAE.pth` or `Wan2.2_VAE.pth`, told apart by their keys.

    Widths and latent channels are those of the file; depth and strides are the published ones. Mean and standard
    deviation of the latents are published for 16 and 48 channels. Raises: CheckpointError.
    """
    from diffusers import AutoencoderKLWan

    state = read_original(path)
    nested = any(key.startswith("encoder.downsamples.0.downsamples.") for key in state)
    channels = _shape(state, "conv2.weight", 5, path)[0]
    if channels not in _VAE_STATISTICS:
        raise CheckpointError(
            f"{path} has conv2.weight of {channels} latent channels, whose mean and std are not published; "
            f"use a VAE of {' or '.join(map(str, _VAE_STATISTICS))} channels"
        )
    width, pixels = _shape(state, "encoder.conv1.weight", 5, path)[:2]
    mean, std = _VAE_STATISTICS[channels]
    patch = 2 if nested else None
    with torch.device("meta"):
        module = AutoencoderKLWan(
            base_dim=width,
            decoder_base_dim=_shape(state, "decoder.head.0.gamma", 4, path)[0],
            z_dim=channels,
            dim_mult=_VAE_MULTIPLIERS,
            num_res_blocks=_VAE_RES_BLOCKS,
            temperal_downsample=_VAE_TEMPORAL,
            latents_mean=mean,
            latents_std=std,
            is_residual=nested,
            in_channels=pixels,
            out_channels=_shape(state, "decoder.head.2.weight", 5, path)[0],
            patch_size=patch,
            scale_factor_temporal=2 ** sum(_VAE_TEMPORAL),
            scale_factor_spatial=2 ** (len(_VAE_MULTIPLIERS) - 1) * (patch or 1),
        )
    places = _vae_places(nested)
    return _fill(module, lambda key: _vae_origin(key, places), state, path, device, dtype)
