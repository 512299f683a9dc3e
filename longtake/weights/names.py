"""Names of a transformer's parameters: original Wan, diffusers, and what training wrappers insert into them.

Source of the table: specification A.2, checked against diffusers' WanTransformer3DModel; of the wrappers: K.3. This
file must know no tensor and no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from longtake.errors import CheckpointError

# Whole modules, not substrings: `norm2` and `norm3` swap meaning between the two formats.
_TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{a}": f"attn1.{b}" for a, b in _ATTENTION.items()},
    **{f"cross_attn.{a}": f"attn2.{b}" for a, b in _ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}


_TO_DIFFUSERS = (_TOP, _BLOCK)
_TO_ORIGINAL = tuple({diffusers: original for original, diffusers in table.items()} for table in _TO_DIFFUSERS)

# What FSDP1, activation checkpointing and compile insert wherever they wrap a module
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|_forward_module)\.")
# What DDP, ComfyUI, diffusers, DiffSynth and the wrapper classes of Self-Forcing's family put before the whole model
_OWNERS = re.compile(
    r"((module|model|diffusion_model|transformer|dit|generator|generator_ema|student|ema|ema_model|net|pipe)\.)+"
)
# What may lie beside a transformer in one flat file: ComfyUI's checkpoints, Lightning's state dicts
_BESIDE = re.compile(
    r"((module|model)\.)*(vae|first_stage_model|text_encoders?|cond_stage_model|conditioner|image_encoder|clip|critic|"
    r"fake_score|real_score|discriminator|teacher)\."
)


def clean_name(name: str) -> str:
    """A parameter's name without the parts that FSDP1, activation checkpointing and compile insert."""
    return _WRAPPERS.sub("", name)


def clean_key(key: str) -> str:
    """The model's own name of a checkpoint's key: no wrapper anywhere, no leading `model.`, `transformer.`, ..."""
    key = clean_name(key)
    owner = _OWNERS.match(key)
    return key[owner.end() :] if owner else key


def is_beside(key: str) -> bool:
    """True for a key of an encoder or another network that lies in one flat file with a transformer."""
    return bool(_BESIDE.match(clean_name(key)))


def _renamed(key: str, tables: Sequence[Mapping[str, str]]) -> str | None:
    match = re.fullmatch(r"(blocks\.\d+\.)?(.+)", key)
    if match is None:
        return None
    prefix, rest = match[1] or "", match[2]
    table = tables[1 if prefix else 0]
    module, _, leaf = rest.rpartition(".")
    if rest in table:
        return prefix + table[rest]
    return f"{prefix}{table[module]}.{leaf}" if module in table else None


def to_diffusers_key(key: str) -> str:
    """The diffusers name of an original Wan key. Raises: CheckpointError when the key is none."""
    if (renamed := _renamed(key, _TO_DIFFUSERS)) is None:
        raise CheckpointError(f"{key!r} is not a parameter name of the original Wan transformer")
    return renamed


def shown_key(key: str) -> str:
    """The diffusers name of an original Wan key, or the key itself when it is none."""
    return _renamed(key, _TO_DIFFUSERS) or key


def is_diffusers(keys: Iterable[str]) -> bool:
    """True when the names are those of diffusers."""
    return any(re.match(r"condition_embedder\.|blocks\.\d+\.(attn1|attn2|ffn\.net)\.", key) for key in keys)


def original_names(keys: Iterable[str]) -> dict[str, str]:
    """Cleaned checkpoint keys -> original Wan names, whichever of the two formats the keys are in.

    A key that is no parameter of the format keeps its own name, so that it is listed as surplus later.
    """
    keys = list(keys)
    if not is_diffusers(keys):
        return {key: key for key in keys}
    renamed = {key: _renamed(key, _TO_ORIGINAL) for key in keys}
    taken = set(renamed.values())
    return {key: name or (f"{key} (no name of diffusers)" if key in taken else key) for key, name in renamed.items()}
