"""Where weights are found: published layouts, training runs, names of the hub, and what is said when there are none."""

import subprocess
import sys

import pytest
from tiny_stage import save_student, stage_config

from longtake.errors import CheckpointError
from longtake.weights.locate import WeightSource, find_encoders, find_weights


def touch(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return files[0]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["a.safetensors", "transformer/b.safetensors"], "."),
        (["transformer/b.safetensors", "vae/c.safetensors"], "transformer"),
        (["generator/a.safetensors"], "generator"),
        (["generator/a.safetensors", "generator_ema/a.safetensors"], "generator_ema"),
        (["high_noise_model/a.safetensors", "one.safetensors"], "."),
    ],
)
def test_folders(tmp_path, files, found):
    touch(*(tmp_path / file for file in files))
    assert find_weights(tmp_path) == find_weights(str(tmp_path)) == WeightSource(tmp_path / found)


@pytest.mark.parametrize("name", ["a.safetensors", "student.pt", "student.pth", "a.bin", "A.CKPT"])
def test_files(tmp_path, name):
    assert find_weights(touch(tmp_path / name)) == WeightSource(tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"a.txt holds no weights \(it begins with b'hello'\).* give a .safetensors, .pt"
    ):
        (tmp_path / "a.txt").write_text("hello")
        find_weights(tmp_path / "a.txt")


def test_training_runs_bring_their_checkpoint(workshop, tmp_path):
    save_student(stage_config(workshop, tmp_path, "causal"), step=2)
    save_student(stage_config(workshop, tmp_path, "distill", init_from="causal"), ema=False, step=1)
    first, second = (tmp_path / name / "checkpoints" for name in ("causal/", "distill/"))
    averaged = WeightSource(first / "step_000002" / "generator_ema", first / "step_000002")
    assert (
        find_weights(tmp_path / "causal")
        == find_weights(averaged.path)
        == find_weights(averaged.checkpoint)
        == averaged
    )
    assert find_weights(tmp_path) == WeightSource(second / "step_000001" / "generator", second / "step_000001")
    file = second / "step_000001" / "generator" / "model.safetensors"
    assert find_weights(file) == WeightSource(file, second / "step_000001")


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(find_weights("Wan-AI/Wan2.2-T2V-A14B/low_noise_model").path) == "Wan-AI/Wan2.2-T2V-A14B/low_noise_model"
    for source, logdir in (("./Wan-AI/Wan2.1", None), ("runs/causal", "runs"), ("/no/such", None), ("name", None)):
        with pytest.raises(CheckpointError, match="does not exist; give a folder or file of weights, a training run"):
            find_weights(source, logdir)
    (tmp_path / "Wan-AI").mkdir()
    with pytest.raises(CheckpointError, match="does not exist"):
        find_weights("Wan-AI/Wan2.1-T2V-1.3B")


def test_two_transformers_and_none(tmp_path):
    touch(
        tmp_path / "two" / "high_noise_model" / "a.safetensors", tmp_path / "two" / "low_noise_model" / "a.safetensors"
    )
    with pytest.raises(CheckpointError, match="holds two transformers; give .*high_noise_model or .*low_noise_model"):
        find_weights(tmp_path / "two")
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors, nor do transformer, .* as a training run: "):
        find_weights(tmp_path / "none")


@pytest.mark.parametrize("place", ["model", "model/encoders", ".", "encoders"])
def test_encoders_are_found_in_and_beside_the_weights(tmp_path, place):
    weights = touch(tmp_path / "model" / "a.safetensors")
    touch(tmp_path / place / "vae" / "a.safetensors")
    assert find_encoders(weights) == find_encoders(weights.parent) == tmp_path / place


def test_no_torch_is_needed():
    code = "import sys, longtake.weights.locate, longtake.encoders.fingerprint; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
