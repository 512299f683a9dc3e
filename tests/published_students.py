"""Files of published students, written as their own code writes them, with any tensors in them.

Names, top keys and prefixes are those of specification P, and written here once more, apart from the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SF = "gdhe17/Self-Forcing/checkpoints/self_forcing_"
_CF = "zhuhz22/Causal-Forcing/"
_PLUS = "ZihanSu/Self_Gradient_Forcing_Plus/"
_RCM = "worstcoder/rcm-Wan/Causal_rCM_Wan2.1_T2V_1.3B_480p_TF-dCM-init_SF-DMD_"
# Name -> (repository and file, its state dicts: the one that is played first)
FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "LongLive": ("Efficient-Large-Model/LongLive-1.3B/models/longlive_base.pt", ("generator", "generator_ema")),
    "Self-Forcing (DMD)": (f"{_SF}dmd.pt", ("generator_ema", "generator")),
    "Self-Forcing (SiD)": (f"{_SF}sid.pt", ("generator_ema", "generator")),
    "Self-Forcing (SiD v2)": (f"{_SF}sid_v2.pt", ("generator_ema", "generator")),
    "Self-Forcing (GAN)": (f"{_SF}gan.pt", ("generator_ema", "generator")),
    "CausVid (3 steps)": ("tianweiyy/CausVid/autoregressive_checkpoint/model.pt", ("generator",)),
    "CausVid (4 steps)": ("tianweiyy/CausVid/autoregressive_checkpoint_warp_4step_cfg2/model.pt", ("generator",)),
    "Causal-Forcing (chunkwise)": (f"{_CF}chunkwise/causal_forcing.pt", ("generator", "generator_ema")),
    "Causal-Forcing (framewise)": (f"{_CF}framewise/causal_forcing.pt", ("generator_ema", "generator")),
    "Causal-Forcing++ (2 steps)": (f"{_CF}causal-forcing++/framewise-2step.pt", ("generator_ema",)),
    "Causal-Forcing++ (1 step)": (f"{_CF}causal-forcing++/framewise-1step.pt", ("generator_ema",)),
    "Self-Gradient-Forcing (chunkwise)": (
        "JunhaoZhuang/Self_Gradient_Forcing/chunkwise/ar/model.pt",
        ("generator_ema",),
    ),
    "Self-Gradient-Forcing (framewise)": (
        "JunhaoZhuang/Self_Gradient_Forcing/framewise/ar/model.pt",
        ("generator_ema",),
    ),
    "Self-Gradient-Forcing+ (chunkwise)": (f"{_PLUS}chunkwise/model.pt", ("generator_ema",)),
    "Self-Gradient-Forcing+ (framewise)": (f"{_PLUS}framewise/model.pt", ("generator_ema",)),
    "Causal-rCM (framewise, 4 steps)": (f"{_RCM}c1-1_step4.pt", ()),
    "Causal-rCM (framewise, 2 steps)": (f"{_RCM}c1-1_step2.pt", ()),
    "Causal-rCM (framewise, 2 steps, noisy context)": (f"{_RCM}c1-1_step2_noisy_ctx.pt", ()),
    "Causal-rCM (chunkwise, 4 steps)": (f"{_RCM}c3-3_step4.pt", ()),
    "Causal-rCM (chunkwise, 2 steps)": (f"{_RCM}c3-3_step2.pt", ()),
}
LINEAR = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v")
LINEAR += ("cross_attn.o", "ffn.0", "ffn.2")
RANK = 256


def write_student(name: str, state: Mapping[str, Tensor], folder: Path) -> Path:
    """The files of a student with the weights `state` (Wan's names) in a folder that stands for its repository."""
    model, networks = FILES[name]
    file = folder.joinpath(*model.split("/")[2:])
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(_content({**state, **memory_of(state)} if model.startswith(_PLUS) else state, networks), file)
    if name == "LongLive":
        torch.save({"generator_lora": lora_of(state), "step": 3000}, file.with_name("lora.pt"))
    return file


def memory_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The second network of SGF+, other numbers, under the names that its code gives it: memory_ before a parameter of a
    linear layer, of the norms that it has of its own and of modulation, and before a whole module outside of blocks.
    """
    found = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        name = f"{module}.memory_{leaf}" if key.startswith("blocks.") else f"memory_{key}"
        found[name] = _scaled(value, 1.5)
    return found


def _content(state: Mapping[str, Tensor], networks: tuple[str, ...]) -> dict[str, Any]:
    if not networks:  # Causal-rCM: flat, patches as a linear layer, counters
        flat = {f"net.{key}": value for key, value in state.items()}
        patch = flat["net.patch_embedding.weight"]
        flat["net.patch_embedding.weight"] = patch.reshape(patch.shape[0], -1)
        return {**flat, "net.accum_video_sample_counter": torch.tensor(3), "net.accum_iteration": torch.zeros(1)}
    content: dict[str, Any] = {"critic": {"model.head.head.bias": torch.ones(3)}, "step": 600}
    for network in networks:
        prefix = "model._fsdp_wrapped_module." if network.endswith("_ema") else "model."
        scale = 1.0 if network == networks[0] else 2.0  # the other one is other weights
        content[network] = {
            prefix + key: value if scale == 1 else _scaled(value, scale) for key, value in state.items()
        }
    return content


def _scaled(value: Tensor, scale: float) -> Tensor:
    """`value * scale`; what repeats one number (a hollow file's) goes on to do so."""
    if value.dim() and not any(value.stride()):
        return (value[(0,) * value.dim()] * scale).expand(value.shape)
    return value * scale


def lora_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Low-rank updates of all linear layers of the blocks under PEFT's names."""
    generator, updates = torch.Generator().manual_seed(7), {}
    for key, value in state.items():
        if key.startswith("blocks.") and key.endswith(".weight") and key.split(".", 2)[2][:-7] in LINEAR:
            layer = f"base_model.model.{key.removesuffix('.weight')}"
            width = 1 if value.is_meta or value.untyped_storage().nbytes() < value.nbytes else None
            for part, shape in (("A", (RANK, value.shape[1])), ("B", (value.shape[0], RANK))):
                numbers = torch.randn(shape if width is None else (width,), generator=generator) / RANK
                updates[f"{layer}.lora_{part}.weight"] = numbers if width is None else numbers.expand(shape)
    return updates


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What LongLive's own code plays: W + (alpha / rank) B A with alpha = rank."""
    updates = lora_of(state)

    def weight(key: str, value: Tensor) -> Tensor:
        layer = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" not in updates:
            return value
        return value + updates[f"{layer}.lora_B.weight"] @ updates[f"{layer}.lora_A.weight"]

    return {key: weight(key, value) for key, value in state.items()}
