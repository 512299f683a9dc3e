"""One download: what a repository holds is known and said first; what is missing, or offline, says what to do."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import errors
from PIL import Image
from safetensors.torch import load_file
from tiny_sessions import PICTURE, A
from tiny_stage import TEACHER, make_encoders, make_model, save_encoders
from tiny_wan import I2V, T2V
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.generation import GenerationConfig, write_rules
from longtake.doctor.run import diagnose_stream
from longtake.encoders.bundle import Encoders
from longtake.errors import CheckpointError
from longtake.inference.generator import Generator, Source
from longtake.weights import hub as hub_module
from longtake.weights.config_json import config_to_json
from longtake.weights.convert import convert
from longtake.weights.load import load_dit, save_dit

RULES = {"height": 32, "width": 32, "sampler": "stream"}
NAME = "Somebody/Streams"


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Encoders in diffusers' layout."""
    return save_encoders(make_encoders(), tmp_path_factory.mktemp("encoders"))


def as_original(encoders: Path, folder: Path) -> None:
    """Names of the original layout, which only lists: nothing of them is read."""
    for file in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json",
                 "google/umt5-xxl/tokenizer_config.json", "google/umt5-xxl/spiece.model",
                 "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"):  # fmt: skip
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(bytes(1000))


def publish(folder: Path, encoders: Path, config=I2V, *, rules: bool = False) -> None:
    save_dit(config, make_model(config).state_dict(), folder)
    shutil.copytree(encoders, folder, dirs_exist_ok=True)
    (folder / "README.md").write_text("not needed")
    (folder / "assets.bin.txt").write_text("not needed")
    if rules:
        write_rules(folder, GenerationConfig(height=32, width=32, num_latent_frames=5))


# ---- one name fetches all ------------------------------------------------------------------------------------------
def test_one_name_brings_transformer_encoders_and_rules(hub, parts, caplog):
    caplog.set_level("INFO")
    publish(hub(NAME), parts, rules=True)
    source = Source.of_model(NAME)
    assert source.settings.height == 32 and str(source.encoders) == NAME  # its generation.yaml was read
    assert sorted(hub.fetched) == ["config.json", "generation.yaml"]  # and nothing large
    generator = Generator.build(source, "cpu")
    assert len(list(generator.stream(PICTURE, A, num_frames=9))) == 2
    assert len(hub.fetched) == len(set(hub.fetched))
    assert not {"README.md", "assets.bin.txt"} & set(hub.fetched)
    assert {file.split("/")[0] for file in hub.fetched} == {
        *("config.json", "generation.yaml", "diffusion_pytorch_model.safetensors"),
        *("vae", "text_encoder", "image_encoder"),
    }
    sizes = {file: (hub(NAME) / file).stat().st_size for file in hub.fetched}
    said = next(line for line in caplog.messages if line.startswith(f"Fetching {NAME}:"))
    for what in ("transformer", "VAE", "text encoder", "image encoder"):
        assert what in said
    assert said.endswith(f"({sum(sizes.values()) / 1e6:.1f} MB)")
    hub.fetched.clear()
    Generator.build(Source.of_model(NAME), "cpu")
    assert hub.fetched == [] and any(line.startswith(f"In the hub's cache: {NAME}:") for line in caplog.messages)


def test_text_weights_fetch_no_image_encoder_and_the_original_layout_its_tokenizer(hub, parts):
    save_dit(T2V, make_model(T2V).state_dict(), hub("a/t2v"))
    as_original(parts, hub("a/t2v"))
    (hub("a/t2v") / "vae").mkdir()  # diffusers' layout beside it: one VAE is enough
    (hub("a/t2v") / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(1000))
    result = invoke("download", "a/t2v")
    assert result.exit_code == 0 and "Ready: longtake generate --model a/t2v" in result.output, result.output
    assert sorted(hub.fetched) == [
        *("Wan2.1_VAE.pth", "config.json", "diffusion_pytorch_model.safetensors", "google/umt5-xxl/spiece.model"),
        *("google/umt5-xxl/tokenizer.json", "google/umt5-xxl/tokenizer_config.json"),
        "models_t5_umt5-xxl-enc-bf16.pth",
    ]


def test_an_expert_takes_the_encoders_of_its_repository(hub, parts):
    for expert in ("high_noise_model", "low_noise_model"):
        save_dit(I2V, make_model(I2V).state_dict(), hub("a/two") / expert)
    shutil.copytree(parts, hub("a/two"), dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="a/two holds two transformers; give a/two/high_noise_model or a/two/low"):
        Source.of_model("a/two", changes=RULES)
    source = Source.of_model("a/two/low_noise_model", changes=RULES).fetched()
    assert source.weights == hub.cache("a/two") / "low_noise_model" and source.encoders == hub.cache("a/two")
    assert not any(file.startswith("high_noise_model") for file in hub.fetched)
    Generator.build(source, "cpu")


@pytest.mark.parametrize("sizes", ["ours", "Wan's", "an index"])
def test_weights_that_need_clip_are_refused_before_they_are_fetched(hub, parts, caplog, sizes):
    publish(hub(NAME), parts, rules=True)
    shutil.rmtree(hub(NAME) / "image_encoder")
    config, weights = hub(NAME) / "config.json", hub(NAME) / "diffusion_pytorch_model.safetensors"
    if sizes != "ours":  # which names no image_dim, as of Wan2.2's weights without that branch
        told = json.loads(config.read_text())
        config.write_text(json.dumps({name: told[name] for name in told.keys() - {"image_dim", "image_positions"}}))
    if sizes == "an index":
        places = dict.fromkeys(load_file(weights), weights.name)
        (hub(NAME) / f"{weights.name}.index.json").write_text(json.dumps({"weight_map": places}))
    source = Source.of_model(NAME)
    with pytest.raises(CheckpointError, match=f"{NAME} .* has no image encoder; name .* --encoders Wan-AI/Wan2.1-I2V"):
        source.fetched()
    assert not any(file.endswith((".safetensors", ".pth")) for file in hub.fetched)
    assert invoke("download", NAME).exit_code == 0  # encoders may come from elsewhere: said before and after
    assert f"{NAME} has no image encoder: the model will need --encoders" in caplog.messages


def test_weights_of_wan_2_2_whose_sizes_are_called_i2v_need_no_clip(hub, parts, tmp_path):
    sizes = replace(I2V, image_dim=None)
    publish(hub(NAME), parts, sizes, rules=True)
    shutil.rmtree(hub(NAME) / "image_encoder")
    told = config_to_json(sizes)
    (hub(NAME) / "config.json").write_text(json.dumps({name: told[name] for name in told.keys() - {"image_dim"}}))
    source = Source.of_model(NAME).fetched()
    assert source.weights == hub.cache(NAME) and not source.needs_image
    Generator.build(source, "cpu")


def test_encoders_of_one_repository_for_weights_of_another_or_from_here(hub, parts, tmp_path):
    save_dit(I2V, make_model(I2V).state_dict(), hub("a/bare"))
    shutil.copytree(parts, hub("b/encoders"))
    message = (
        r"a/bare on the Hugging Face hub has no VAE and no text encoder and no image encoder; name .* --encoders Wan"
    )
    with pytest.raises(CheckpointError, match=message):
        Source.of_model("a/bare", changes=RULES)
    assert not any("safetensors" in file for file in hub.fetched)
    for encoders in ("b/encoders", parts):
        Generator.build(Source.of_model("a/bare", encoders, changes=RULES), "cpu")
    save_dit(I2V, make_model(I2V).state_dict(), tmp_path / "local")
    Generator.build(Source.of_model(tmp_path / "local", changes={**RULES, "encoders": "b/encoders"}), "cpu")
    with pytest.raises(CheckpointError, match="a/bare on the Hugging Face hub has no VAE"):
        Generator.build(Source.of_model(tmp_path / "local", "a/bare", changes=RULES), "cpu")
    result = invoke("download", "a/bare")
    assert result.exit_code == 0 and "has no VAE and no text encoder and no image encoder: name" in result.output


@pytest.mark.whole
def test_the_doctor_asks_for_the_sizes_alone(hub, parts):
    publish(hub(NAME), parts, replace(T2V, in_channels=16, out_channels=16), rules=True)
    assert diagnose_stream(NAME, device="80GB").ok and set(hub.fetched) == {"config.json", "generation.yaml"}


# ---- what is refused -----------------------------------------------------------------------------------------------
@pytest.fixture
def unread(monkeypatch):
    """Files of weights that were opened."""
    opened: list[Path] = []
    monkeypatch.setattr("longtake.weights.load.open_published", lambda path, *_, **__: opened.append(path))
    monkeypatch.setattr(Encoders, "load", lambda *_, **__: opened.append(Path("encoders")))
    return opened


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--model", "x/y", "--prompt", "p", "-o", "o.mp4"),
        ("generate", "--model", "toy", "--encoders", "x/y", "--prompt", "p", "--image", "a.png", "-o", "o.mp4"),
        ("play", "--model", "x/y", "--prompt", "p", "-o", "o.mp4"),
        ("evaluate", "--model", "x/y", "-o", "report"),
        ("convert", "x/y", "target", "--to", "longtake"),
        ("download", "x/y"),
        ("verify", "x/y"),
        ("bench", "--model", "x/y"),
    ],
)
def test_what_is_not_there_is_one_message_and_reads_nothing(hub, unread, command):
    Image.fromarray(PICTURE).save("a.png")
    result = invoke(*command)
    assert result.exit_code == 1, result.output
    assert "x/y is neither a local path nor a repository of the Hugging Face hub; " in result.output
    assert "Traceback" not in result.output and len(result.output.strip().splitlines()) == 1
    hub.offline = errors.OfflineModeIsEnabled("Cannot reach it: offline mode is enabled.")
    result = invoke(*command)
    assert (
        result.exit_code == 1 and "the Hugging Face hub cannot be asked for it here (Cannot reach it" in result.output
    )
    assert "`longtake download x/y -o FOLDER`, copy FOLDER here and give its path" in result.output
    assert "Traceback" not in result.output and len(result.output.strip().splitlines()) == 1
    assert unread == [] and hub.fetched == []


def test_close_names_and_files_that_are_there_are_told(hub):
    with pytest.raises(CheckpointError, match=r"did you mean Wan-AI/Wan2.1-T2V-1.3B or "):
        load_dit("Wan-AI/Wan2.1-T2V-1.3")
    with pytest.raises(CheckpointError, match=r"did you mean Efficient-Large-Model/LongLive-1.3B or .*\? A private"):
        load_dit("efficient-large-model/LongLive-1.3")
    hub("a/files").mkdir(parents=True)
    for file in ("one.pt", "two.ckpt", "notes.txt"):
        (hub("a/files") / file).write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"no transformer lies .* a/files .*it holds one.pt, two.ckpt; give a/files/"
    ):
        load_dit("a/files")
    assert hub.fetched == []
    with pytest.raises(CheckpointError, match=r"is GGUF"):
        load_dit("a/files/model.gguf")


def test_gated_repositories_and_failing_downloads_say_what_to_do(hub, parts, monkeypatch):
    import httpx2
    import huggingface_hub

    publish(hub(NAME), parts, rules=True)
    request = httpx2.Request("GET", "https://hub")
    for error, said in (
        (errors.GatedRepoError("403", response=httpx2.Response(403, request=request)), "is gated; accept its terms at"),
        (httpx2.ConnectError("reset by peer"), "could not be fetched .*reset by peer; run the command again"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(CheckpointError, match=said):
            Source.of_model(NAME)


def test_a_full_disk_is_said_before_anything_large_is_fetched(hub, parts, monkeypatch):
    publish(hub(NAME), parts, rules=True)
    source = Source.of_model(NAME)
    hub.fetched.clear()
    free = shutil.disk_usage("/")._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free)
        with pytest.raises(
            CheckpointError, match=r"MB are to be fetched to .*, and its disk has 0.0 MB left;.*HF_HOME"
        ):
            source.fetched()
    assert hub.fetched == []


def test_what_is_there_needs_no_room_once_more(hub, parts, tmp_path, monkeypatch):
    """A download into a folder goes on where most of the disk is taken by what came before."""
    publish(hub(NAME), parts, rules=True)
    assert invoke("download", NAME, "-o", tmp_path / "copy").exit_code == 0
    (tmp_path / "copy" / "config.json").unlink()
    (tmp_path / "copy" / "generation.yaml").write_text("cut")  # not whole
    free = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert invoke("download", NAME, "-o", tmp_path / "copy").exit_code == 0
    assert (tmp_path / "copy" / "config.json").is_file()
    free = free._replace(free=10)
    assert "are to be fetched to" in invoke("download", NAME, "-o", tmp_path / "other").output


# ---- without a network -----------------------------------------------------------------------------------------------
def test_what_was_fetched_is_there_without_a_network(hub, parts, tmp_path):
    publish(hub(NAME), parts, rules=True)
    assert invoke("download", NAME).exit_code == 0
    assert invoke("download", NAME, "-o", tmp_path / "copy").exit_code == 0
    for offline in (errors.OfflineModeIsEnabled("offline"), OSError("unreachable")):
        hub.offline = offline
        one = Generator.build(Source.of_model(NAME), "cpu")
        assert one.settings.height == 32
        assert Source.of_model(tmp_path / "copy").encoders == tmp_path / "copy"
    convert(NAME, tmp_path / "converted", "longtake")
    rules = (hub(NAME) / "generation.yaml").read_text()  # go along
    assert (tmp_path / "converted" / "generation.yaml").read_text() == rules


# ---- encoders: the same words everywhere -----------------------------------------------------------------------------
def test_the_toy_is_not_downloaded():
    result = invoke("download", "toy")
    assert result.exit_code == 2 and "toy comes with the package, and nothing of it is fetched" in result.output


def test_toy_means_the_packaged_encoders_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PICTURE).save("a.png")
    toy = Source.of_model("toy").weights
    Path("bare").mkdir()
    for file in ("diffusion_pytorch_model.safetensors", "config.json", "generation.yaml"):
        shutil.copy(toy / file, "bare")
    expected = Source.of_model("toy").encoders
    assert Source.of_model("bare", "toy").encoders == expected
    assert Source.of_model("bare", changes={"encoders": "toy"}).encoders == expected
    begin = ("generate", "--model", "bare", "--image", "a.png", "--prompt", A, "--frames", "5", "--device", "cpu")
    for words in (("--encoders", "toy"), ("encoders=toy",)):
        result = invoke(*begin, *words, "-o", "o.mp4", "--overwrite")
        assert result.exit_code == 0, result.output
    result = invoke(*begin, "--encoders", "no/such/folder", "-o", "p.mp4")
    assert result.exit_code == 1 and "no/such is neither" not in result.output
    result = invoke(*begin, "--encoders", "./nothing", "-o", "p.mp4")
    assert result.exit_code == 1
    assert "the encoder folder nothing does not exist; give the folder of a Wan model, OWNER/NAME" in result.output


def test_what_config_json_says_decides_about_the_image_encoder(tmp_path):
    for config in (TEACHER, T2V):
        folder = tmp_path / config.model_type
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config_to_json(config)))
        assert hub_module.needs_image(folder) == (config.image_dim is not None)
    assert hub_module.needs_image(tmp_path)
