"""`convert`: every layout into every other and back, bit for bit; whole or not at all."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import randomize

import longtake.weights.load as weights
from longtake.cli.app import app
from longtake.config.stage import TOY_ASSETS
from longtake.errors import CheckpointError, ConfigError, OutputError
from longtake.models.dit import VideoDiT
from longtake.models.sizes import DiTConfig
from longtake.weights.config_json import config_to_diffusers, config_to_json, config_to_original
from longtake.weights.convert import convert
from longtake.weights.names import to_diffusers_key

NARROW = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "freq_dim": 32}
I2V = {"model_type": "i2v", "in_channels": 36, "image_dim": 1280}
KINDS = {
    "fun-1.3b-inp": DiTConfig(**NARROW, num_layers=30, **I2V),
    "i2v-14b": DiTConfig(**NARROW, num_layers=40, **I2V),
    "i2v-a14b": DiTConfig(**NARROW, num_layers=3, model_type="i2v", in_channels=36),
    "flf2v": DiTConfig(**NARROW, num_layers=2, **I2V | {"model_type": "flf2v"}, image_positions=514),
    "ti2v": DiTConfig(**NARROW, num_layers=2, model_type="ti2v", in_channels=48, out_channels=48),
    "t2v": DiTConfig(**NARROW, num_layers=2),
}
WEIGHTS, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"


def published(config: DiTConfig, folder: Path) -> dict[str, torch.Tensor]:
    """An original folder with tensors of mixed types, as the published ones are (bfloat16 with float32 parts)."""
    model = VideoDiT(config)
    randomize(model)
    types = (torch.bfloat16, torch.float32, torch.float16)
    state = {key: value.to(types[n % 3]) for n, (key, value) in enumerate(model.state_dict().items())}
    folder.mkdir(parents=True)
    save_file(state, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config_to_original(config)))
    return state


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        held |= load_file(file)
    return held


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("alone", [False, True])
def test_the_rules_of_a_student_go_along(tmp_path: Path, alone: bool) -> None:
    """From a folder, and from a file in it; else the converted student would stream by other rules."""
    source = TOY_ASSETS / "student" / (WEIGHTS if alone else "")
    convert(source, tmp_path / "converted", "longtake")
    rules = (TOY_ASSETS / "student" / "generation.yaml").read_text()
    assert (tmp_path / "converted" / "generation.yaml").read_text() == rules


@pytest.mark.whole
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(kind: str, tmp_path: Path) -> None:
    state = published(KINDS[kind], tmp_path / "original")
    step = tmp_path / "original"
    for number, to in enumerate(("diffusers", "longtake", "diffusers", "original")):
        size = 1 << 18 if number % 2 else 1 << 40
        previous, step = step, tmp_path / f"{number}-{to}"
        convert(previous, step, to, shard_bytes=size)
        names = {to_diffusers_key(key): v for key, v in state.items()} if to == "diffusers" else state
        assert identical(tensors(step), names)
        assert (step / INDEX).exists() == (number % 2 == 1)
    assert json.loads((step / "config.json").read_text()) == config_to_original(KINDS[kind])
    longtake = json.loads((tmp_path / "1-longtake" / "config.json").read_text())
    assert longtake == config_to_json(KINDS[kind])
    model = weights.load_dit(step)
    assert model.config == KINDS[kind] and identical(dict(model.state_dict()), {k: v.float() for k, v in state.items()})


def test_diffusers_reads_what_was_written_and_would_have_written_the_same_config(tmp_path: Path, caplog) -> None:
    from diffusers import WanTransformer3DModel

    state = published(KINDS["flf2v"], tmp_path / "original")
    files = convert(tmp_path / "original", tmp_path / "out", "diffusers", shard_bytes=1 << 20)
    assert len(files) > 2
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        theirs = WanTransformer3DModel.from_pretrained(tmp_path / "out")
    assert not caplog.records
    assert {k: v.float() for k, v in theirs.state_dict().items()}.keys() == {to_diffusers_key(k) for k in state}
    for key, value in state.items():
        assert torch.equal(theirs.state_dict()[to_diffusers_key(key)], value.float())
    own = json.loads(theirs.to_json_string())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: own[key] for key in own if key not in ("_diffusers_version", "_name_or_path")} == written


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    state = published(KINDS["t2v"], tmp_path / "original")
    bound = 70_000  # below the largest tensor, which then has a file of its own
    files = convert(tmp_path / "original", tmp_path / "out", "original", shard_bytes=bound)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert all(file.name.endswith(f"-of-{len(files):05d}.safetensors") for file in files)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in state.values())
    for file in files:
        held = load_file(file)
        assert set(held) == {name for name, place in index["weight_map"].items() if place == file.name}
        assert len(held) == 1 or sum(t.numel() * t.element_size() for t in held.values()) <= bound


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path, monkeypatch) -> None:
    published(KINDS["t2v"], tmp_path / "original")
    before = (tmp_path / "original" / WEIGHTS).read_bytes()
    for target, overwrite in ((tmp_path / "original", True), (tmp_path, True)):
        with pytest.raises(ConfigError, match="is in use .*and would be lost"):
            convert(tmp_path / "original", target, "diffusers", overwrite=overwrite)
    assert (tmp_path / "original" / WEIGHTS).read_bytes() == before
    with pytest.raises(ConfigError, match="a shard of 0 bytes holds nothing"):
        convert(tmp_path / "original", tmp_path / "out", "diffusers", shard_bytes=0)

    def full(*arguments, **options) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match=r"out.*cannot be written: No space left"):
        convert(tmp_path / "original", tmp_path / "out", "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_only_a_folder_of_weights_is_overwritten(tmp_path: Path) -> None:
    published(KINDS["t2v"], tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "out", "longtake")
    with pytest.raises(ConfigError, match="out exists already; .*--overwrite"):
        convert(tmp_path / "original", tmp_path / "out", "diffusers")
    convert(tmp_path / "original", tmp_path / "out", "diffusers", overwrite=True)
    assert "_class_name" in (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"also holds thesis.txt, which would be lost"):
        convert(tmp_path / "original", tmp_path / "out", "longtake", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "out"]


def test_a_layout_that_cannot_say_the_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"diffusers format cannot say text_len=48 \(it would be read as 512\); conv"
    ):
        convert(TOY_ASSETS / "teacher", tmp_path / "out", "diffusers")
    with pytest.raises(CheckpointError, match=r"original Wan format cannot say text_dim=64 .*4096\), image_dim=64"):
        convert(TOY_ASSETS / "teacher", tmp_path / "out", "original")
    assert not list(tmp_path.iterdir())
    convert(TOY_ASSETS / "teacher", tmp_path / "out", "longtake")
    assert identical(tensors(tmp_path / "out"), tensors(TOY_ASSETS / "teacher"))
    assert config_to_diffusers(KINDS["t2v"])["added_kv_proj_dim"] is None


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    state = published(KINDS["t2v"], tmp_path / "original")
    command = [
        "convert",
        str(tmp_path / "original"),
        str(tmp_path / "out"),
        "--to",
        "diffusers",
        "--shard-bytes",
        "100000",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert sorted(result.output.split()) == sorted(str(file) for file in (tmp_path / "out").glob("*.safetensors"))
    assert identical(tensors(tmp_path / "out"), {to_diffusers_key(key): value for key, value in state.items()})
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2 and "exists already" in again.output


def test_updates_are_files_and_what_to_do_with_names_is_said_before_a_base_is_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("longtake.weights.convert.local_path", lambda _: pytest.fail("the base was asked for"))
    whole = (
        "names a published student, which is written with what updates it has by `longtake convert LongLive out --to"
    )
    for lora, error, told in (
        ("LongLive", ConfigError, f"lora is a file of low-rank updates, and LongLive {whole} longtake`"),
        ("efficient-large-model/longlive-1.3b", ConfigError, whole),
        (
            "owner/updates",
            CheckpointError,
            "of the hub none are fetched, `hf download owner/updates --local-dir updates`",
        ),
        ("lora.pt", CheckpointError, "lora.pt does not exist; give the file of the low-rank updates"),
    ):
        with pytest.raises(error) as caught:
            convert("owner/base", "out", "longtake", lora=lora)
        assert told in str(caught.value)
