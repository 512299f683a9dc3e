"""Bar of the model zoo: published names, shapes and counts at full size, refusals by message."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from paper_files import Shapes, write_tree
from published_tensors import published_table
from safetensors.torch import load_file

from longtake.errors import CheckpointError, ConfigError
from longtake.weights.convert import convert
from longtake.weights.load import load_dit, open_dit
from longtake.weights.presets import PRESETS, fitting_presets, model_config

# Specification A.1: preset -> (parameters, tensors); None where the table gives a rounded number
COUNTS = {
    "wan2.1-t2v-1.3b": (1_418_996_800, 825),
    "wan2.1-t2v-14b": (14_288_491_584, 1095),
    "wan2.1-i2v-14b-480p": (16_394_878_784, 1303),
    "wan2.1-i2v-14b-720p": (16_394_878_784, 1303),
    "wan2.1-flf2v-14b-720p": (16_395_536_704, 1304),
    "wan2.1-fun-1.3b-inp": (1_564_428_608, 983),
    "wan2.2-t2v-a14b": (14_288_491_584, 1095),
    "wan2.2-i2v-a14b": (None, 1095),
    "wan2.2-ti2v-5b": (None, 825),
}
# What the original repositories store (A.2); text_dim, patch and image sizes are not stored.
FUN = {"_class_name": "WanModel", "model_type": "i2v", "dim": 1536, "ffn_dim": 8960, "freq_dim": 256, "in_dim": 36,
       "out_dim": 16, "num_heads": 12, "num_layers": 30, "text_len": 512, "eps": 1e-06}  # fmt: skip
CONFIGS = {
    "wan2.1-fun-1.3b-inp": FUN,
    "wan2.1-i2v-14b-480p": FUN | {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
    "wan2.2-ti2v-5b": FUN | {"model_type": "ti2v", "dim": 3072, "ffn_dim": 14336, "num_heads": 24, "in_dim": 48,
                             "out_dim": 48},
    "wan2.2-i2v-a14b": FUN | {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
}  # fmt: skip
DIFFUSERS = {"_class_name": "WanTransformer3DModel", "added_kv_proj_dim": 1536, "attention_head_dim": 128,
             "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 8960, "freq_dim": 256, "image_dim": 1280,
             "in_channels": 36, "num_attention_heads": 12, "num_layers": 30, "out_channels": 16,
             "patch_size": [1, 2, 2], "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads",
             "rope_max_seq_len": 1024, "text_dim": 4096}  # fmt: skip


def shapes_of(preset: str, *, diffusers: bool = False) -> Shapes:
    """Names and shapes of specification A.2, written out independently of the model."""
    table = published_table(PRESETS[preset])
    return {row[1] if diffusers else key: row[0] for key, row in table.items()}


def test_every_published_model_has_a_preset_of_its_counts() -> None:
    assert PRESETS.keys() == {"toy", *COUNTS}
    for preset, (parameters, tensors) in COUNTS.items():
        shapes = shapes_of(preset)
        assert len(shapes) == tensors
        total = sum(math.prod(shape) for shape in shapes.values())
        assert parameters in (None, total)
    assert round(sum(math.prod(s) for s in shapes_of("wan2.2-ti2v-5b").values()) / 1e9, 1) == 5.0
    assert round(sum(math.prod(s) for s in shapes_of("wan2.2-i2v-a14b").values()) / 1e9, 1) == 14.3
    with pytest.raises(ConfigError, match=r"preset wan3 is neither known \(toy, wan2.1-flf2v-14b-720p, .*folder"):
        model_config("wan3")


@pytest.mark.parametrize(("preset", "shards"), [(name, 1 if "1.3b" in name else 7) for name in CONFIGS])
def test_full_size_trees_open_with_every_tensor(preset: str, shards: int, tmp_path: Path) -> None:
    shapes = shapes_of(preset)
    write_tree(tmp_path / "model", shapes, CONFIGS[preset], shards)
    published, model = open_dit(tmp_path / "model")
    assert model.config == PRESETS[preset] == model_config(preset)
    assert {name: stored.shape for name, stored in published.tensors.items()} == shapes
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    if (wanted := COUNTS[preset][0]) is not None:
        assert sum(p.numel() for p in model.parameters()) == wanted
    # Without its config.json it is recognised by names and shapes alone.
    (tmp_path / "model" / "config.json").unlink()
    assert open_dit(tmp_path / "model")[1].config == PRESETS[preset]
    assert preset in fitting_presets(published.shapes())


def test_a_full_size_diffusers_tree_opens_under_original_names(tmp_path: Path) -> None:
    write_tree(tmp_path / "model", shapes_of("wan2.1-fun-1.3b-inp", diffusers=True), DIFFUSERS, shards=2)
    published, model = open_dit(tmp_path / "model")
    assert published.diffusers and model.config == PRESETS["wan2.1-fun-1.3b-inp"]
    assert {name: stored.shape for name, stored in published.tensors.items()} == shapes_of("wan2.1-fun-1.3b-inp")


def damaged(shapes: Shapes, damage: str, key: str) -> Shapes:
    if damage == "renamed":
        return {name + "_" if name == key else name: shape for name, shape in shapes.items()}
    if damage == "missing":
        return {name: shape for name, shape in shapes.items() if name != key}
    if damage == "surplus":
        return shapes | {key.replace(".0.", ".30."): shapes[key]}
    return shapes | {key: (*shapes[key][:-1], shapes[key][-1] + 2)}


@pytest.mark.parametrize("diffusers", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("renamed", "missing (1): {key}; surplus (1): {key}_"),
        ("missing", "does not fit the model; missing (1): {key}"),
        ("surplus", "does not fit the model; surplus (1): {later}"),
        ("reshaped", "does not fit the model; reshaped (1): {key} (1536, 1538) instead of (1536, 1536)"),
    ],
)
def test_a_full_size_tree_with_one_wrong_tensor_is_refused(
    damage: str, message: str, diffusers: bool, tmp_path: Path
) -> None:
    key = "blocks.0.attn2.add_k_proj.weight" if diffusers else "blocks.0.cross_attn.k_img.weight"
    shapes = damaged(shapes_of("wan2.1-fun-1.3b-inp", diffusers=diffusers), damage, key)
    write_tree(tmp_path / "model", shapes, DIFFUSERS if diffusers else FUN)
    with pytest.raises(CheckpointError) as caught:
        load_dit(tmp_path / "model")
    assert message.format(key=key, later=key.replace(".0.", ".30.")) in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "model"))
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json does not exist, and the tensors .* are those of no preset"):
        load_dit(tmp_path / "model")


def test_a_wrong_config_json_names_the_preset_that_fits(tmp_path: Path) -> None:
    write_tree(tmp_path / "model", shapes_of("wan2.1-fun-1.3b-inp"), FUN | {"model_type": "t2v", "in_dim": 16})
    with pytest.raises(CheckpointError) as caught:
        load_dit(tmp_path / "model")
    for part in ("surplus (158): ", "reshaped (1): patch_embedding.weight (1536, 36, 1, 2, 2) instead of (1536, 16,",
                 "The tensors are those of wan2.1-fun-1.3b-inp: config.json should be, too"):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.slow
def test_fun_1_3b_inp_at_full_size_loads_within_one_copy_and_converts_both_ways(tmp_path: Path) -> None:
    """Needs 4 GB of memory and 7 GB of disk."""
    write_tree(tmp_path / "model", shapes_of("wan2.1-fun-1.3b-inp"), FUN)

    def anonymous() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return 1024 * int(line.split()[1])

    before, peaks, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peaks.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    model = load_dit(tmp_path / "model", dtype=torch.bfloat16)
    done.set()
    thread.join()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 1_564_428_608
    assert 0.97 * size < max(peaks) - before < 1.1 * size
    del model
    convert(tmp_path / "model", tmp_path / "diffusers", "diffusers", shard_bytes=1 << 30)
    files = convert(tmp_path / "diffusers", tmp_path / "back", "original")
    back = load_file(files[0])
    assert {name: tuple(tensor.shape) for name, tensor in back.items()} == shapes_of("wan2.1-fun-1.3b-inp")
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
