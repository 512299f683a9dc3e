"""What a file that should hold weights really is, told by its first bytes and the names of its tensors. No torch here.

Source of the first bytes: huggingface/safetensors README (Format), ggml-org/ggml docs/gguf.md, git-lfs docs/spec.md,
RFC 1740 (AppleDouble); of the names: the state dicts of the models as their own code and diffusers publish them.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from longtake.errors import CheckpointError

_AGAIN = "download it again"
GGUF = (
    "is GGUF, whose quantised weights are not read; take the .safetensors of the same model, or make them: diffusers' "
    "WanTransformer3DModel.from_single_file with a GGUFQuantizationConfig, dequantize(), save_pretrained(FOLDER)"
)
POINTER = b"version https://git-lfs"
_BEGINNINGS = {
    POINTER: "is a Git LFS pointer, which stands for the weights; run `git lfs pull` in its "
    "repository, or get it with `hf download`",
    b"GGUF": GGUF,
    b"PK\x03\x04": f"is a torch.save file or a zip archive that is cut short; {_AGAIN}",
    b"\x00\x05\x16\x07": "is an AppleDouble file, in which macOS keeps notes on the file of that name without `._`; "
    "give that one",
    b"<": f"is a page of HTML or XML and no weights: the download failed; {_AGAIN}",
    b"{": f"is JSON text and no weights, as a download that failed leaves it; {_AGAIN}, or give the folder it lies in",
}
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


# ---- first bytes -----------------------------------------------------------------------------------------------------
def is_pickled(file: Path) -> bool:
    """True for a file of `torch.save`, False for safetensors.

    Raises: CheckpointError that says what a file of any other kind is, and what to do.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(512)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header < 1 << 40:
        if header + 8 > size:
            raise CheckpointError(f"{file} is cut short and cannot be read as safetensors; {_AGAIN}")
        return False
    zipped = head[:4] == b"PK\x03\x04" and zipfile.is_zipfile(file)
    if zipped or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        if file.suffix.lower() == ".safetensors":
            raise CheckpointError(f"{file} is a file of torch.save and no safetensors; rename it to {file.stem}.pt")
        return True
    raise CheckpointError(f"{file} {_what(head)}")


def _what(head: bytes) -> str:
    if not head:
        return f"is empty (0 bytes); {_AGAIN}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, what in _BEGINNINGS.items():
        if head.startswith(beginning) or text.startswith(beginning):
            return what
    return (
        f"holds no weights (it begins with {head[:8]!r}) and cannot be read as safetensors or as a file of torch.save; "
        "give a .safetensors, .pt, .pth, .bin or .ckpt file"
    )


# ---- names of tensors ------------------------------------------------------------------------------------------------
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
        fix = f"give the base, and this as its updates: longtake convert BASE FOLDER --to longtake --lora {source}"
        raise CheckpointError(f"{source} holds low-rank updates, not weights ({found}); {fix}")
    if found := next((name for name in names if _QUANTISED.fullmatch(name)), None):
        kind = f"quantised weights with scales ({found}), as ComfyUI's `scaled` fp8 files do"
        raise CheckpointError(f"{source} holds {kind}; take the bf16, fp16 or fp32 file of the same model")
    what = describe(names)
    if is_wan(names) and what is None:
        return
    got = ", ".join(sorted(names)[:3]) or "nothing"
    if is_wan(names):
        raise CheckpointError(f"{source} holds {what}, whose additional layers are not computed; give plain Wan")
    encoder = " (name the folder of the encoders with --encoders)" if what in _ENCODERS else ""
    raise CheckpointError(
        f"{source} holds {what or 'something else'}{encoder}, not a Wan transformer: expected are names such as "
        f"blocks.0.self_attn.q.weight or blocks.0.attn1.to_q.weight, and got {got}"
    )
