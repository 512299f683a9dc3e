"""What weights are that are no Wan transformer of ours, told by the names of their tensors alone.

Source of the names: the state dicts of the models as their own code and diffusers publish them. Must know no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from longtake.errors import CheckpointError

_WAN = re.compile(r"blocks\.\d+\.(self_attn|attn1)\.|(patch_embedding|text_embedding|condition_embedder)\.")
_UPDATES = re.compile(r".*([._]lora(_[A-Za-z]+_layer)?[._](A|B|up|down|mid|magnitude)|\.(hada_w|lokr_w)|dora_scale)")
_QUANTISED = re.compile(
    r"(.*\.)?(scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|comfy_quant|absmax|quant_map|qweight|"
    r"qzeros|quant_state.*)"
)
# Wan with layers of its own: all its other names are ours.
_RELATIVES = {
    "Wan VACE": r"vace_",
    "Wan-Animate": r"face_adapter\.|motion_encoder\.|pose_patch_embedding\.",
    "Wan2.2-S2V": r"casual_audio_encoder\.|audio_injector\.",
    "Wan Fun Control": r"control_adapter\.|ref_conv\.|.*\.cam_encoder\.",
    "a talking Wan (MultiTalk, InfiniteTalk, FantasyTalking)": r"audio_proj\.|.*\.audio_cross_attn\.|proj_model\.",
}
_ENCODERS = {
    "a VAE": r"(encoder|decoder)\.(conv1|conv_in|middle|mid_block|mid|downsamples|upsamples|down_blocks|up_blocks)\.",
    "a text encoder (T5)": r"(encoder\.)?blocks?\.\d+\.(layer\.[01]\.|attn\.q\.)|shared\.weight",
    "an image or text encoder (CLIP)": r"(visual|vision_model|textual|text_model|embeddings)\.",
}
_OTHERS = {
    "Flux or HunyuanVideo": r"(double_blocks|single_blocks|single_transformer_blocks)\.",
    "Stable Diffusion (a UNet)": r"(input_blocks|output_blocks|middle_block|down_blocks|up_blocks|mid_block)\.",
    "Stable Diffusion 3": r"joint_blocks\.",
    "CogVideoX": r"patch_embed\.(proj|text_proj)\.|transformer_blocks\.\d+\.norm1\.linear|mixins\.",
    "LTX-Video or PixArt": r"patchify_proj\.|caption_projection\.|adaln_single\.",
    "another transformer of diffusers": r"transformer_blocks\.",
    "a language model": r"(model\.)?layers\.\d+\.(self_attn|mlp|input_layernorm)|(h|layers)\.\d+\.attn|lm_head\.",
    "parameters that FSDP has flattened": r"(.*\.)?_?flat_param",
}


def is_wan(names: Iterable[str]) -> bool:
    """True when some names are those of a Wan transformer, original or diffusers'."""
    return any(_WAN.match(name) for name in names)


def describe(names: Iterable[str]) -> str | None:
    """What holds tensors of these names where it is known and no Wan transformer of ours; else None."""
    names = list(names)
    kinds = _RELATIVES if is_wan(names) else _ENCODERS | _OTHERS
    return next((what for what, pattern in kinds.items() if any(re.match(pattern, name) for name in names)), None)


def refuse_others(names: Iterable[str], source: object) -> None:
    """Raises CheckpointError that says what the tensors are, unless they are the plain ones of a Wan transformer."""
    names = list(names)
    if found := next((name for name in names if _UPDATES.match(name)), None):
        raise CheckpointError(
            f"{source} holds low-rank updates, not weights ({found}); give the base as the source and it as the "
            f"updates (lora): longtake convert BASE FOLDER --to longtake --lora {source}"
        )
    if found := next((name for name in names if _QUANTISED.fullmatch(name)), None):
        raise CheckpointError(
            f"{source} holds quantised weights with scales ({found}), as ComfyUI's `scaled` fp8 files do, and these "
            "are not read; take the bf16, fp16 or fp32 file of the same model"
        )
    what = describe(names)
    if is_wan(names) and what is None:
        return
    got = ", ".join(sorted(names)[:3]) or "nothing"
    if is_wan(names):
        raise CheckpointError(
            f"{source} holds {what}, whose additional layers are not computed here; give plain text-to-video or "
            "image-to-video weights of Wan"
        )
    encoder = " (name the folder of the encoders with --encoders)" if what in _ENCODERS else ""
    raise CheckpointError(
        f"{source} holds {what or 'something else'}{encoder}, not a Wan transformer: expected are names such as "
        f"blocks.0.self_attn.q.weight or blocks.0.attn1.to_q.weight, and got {got}"
    )
