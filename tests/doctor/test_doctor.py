"""`longtake doctor`: what is missing, what does not fit, and what the command prints and returns."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_stage import TEACHER, save_student, stage_config, stage_tree
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.stage import TOY_ASSETS
from longtake.data.encoded import EMPTY_TEXT, INDEX
from longtake.doctor import run as module
from longtake.doctor.estimate import Need
from longtake.doctor.files import look_at
from longtake.doctor.machine import Gpu, look
from longtake.doctor.run import diagnose
from longtake.encoders.bundle import Encoders, TextEncoder
from longtake.encodings.write import encode
from longtake.outputs import free_disk
from longtake.parallel.mesh import Mesh
from longtake.weights.load import load_dit
from longtake.weights.presets import PRESETS
from longtake.weights.students import read_table

MB = 10**6
JOB = Path(__file__).parents[2] / "configs" / "toy" / "i2v.yaml"


def write(folder, tree):
    (folder / "stage.yaml").write_text(yaml.safe_dump(tree))
    return folder / "stage.yaml"


def invoke(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


@pytest.fixture
def quick(monkeypatch):
    """Needs that no trace tells: 60 MB at most, 40 with activation checkpointing; calls by stage and ranks."""
    calls = []

    def need(config, sizes, ranks, **_):
        calls.append((config.name, ranks))
        config.accumulation(ranks)
        peak = 40 * MB if config.activation_checkpointing else 60 * MB
        return Need(
            {"trained weights": 10 * MB, "optimizer": 20 * MB}, peak, "backward in the update of the critic", 500
        )

    monkeypatch.setattr(module, "stage_need", need)
    return calls


def test_the_machine_is_the_one_we_are_on(monkeypatch):
    machine = look()
    assert machine.packages["torch"] == torch.__version__ and not machine.missing_packages
    assert machine.cores >= 1 and 0 < machine.ram_free_bytes <= machine.ram_bytes
    assert len(machine.gpus) == torch.cuda.device_count()
    asked = []  # others write to the disk meanwhile
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(str(path)) or SimpleNamespace(free=7))
    assert free_disk("/no/such/folder/yet") == 7 and asked == ["/"]


@pytest.mark.whole
def test_a_complete_stage_is_well(workshop, tmp_path):
    file = write(tmp_path, stage_tree(workshop, tmp_path, "causal"))
    result = invoke(file)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("all is well\n\nstage causal (teacher_forcing), each of 1 rank(s): needs ")
    found = look_at(stage_config(workshop, tmp_path, "distill"))
    assert found.sizes == dict.fromkeys(("generator", "critic", "teacher"), TEACHER)
    assert found.missing == [] == found.notes and found.image_tokens == 17


def test_encoders_are_counted_as_they_are_loaded(workshop, tmp_path):
    encoders = Encoders.load(workshop / "encoders")
    modules = (encoders.vae.module, encoders.text.model, encoders.image.model)
    loaded = sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
    counted = look_at(stage_config(workshop, tmp_path, "distill")).encoder_bytes
    assert loaded <= counted <= 1.01 * loaded  # a file may hold constant buffers, too


def test_original_files_are_counted_without_the_text_tower(workshop, tmp_path):
    folder = tmp_path / "encoders"
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "tokenizer_config.json").touch()
    torch.save({"a": torch.zeros(10, 10)}, folder / "Wan2.1_VAE.pth")
    torch.save({"a": torch.zeros(7, dtype=torch.bfloat16)}, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    clip = {"visual.a": torch.zeros(5, dtype=torch.float16), "textual.a": torch.zeros(1000)}
    torch.save(clip, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    found = look_at(stage_config(workshop, tmp_path, "distill", encoders=str(folder)))
    assert found.encoder_bytes == 4 * (100 + 7 + 5) and found.image_tokens == 257 and not found.missing
    half = {"encoders": str(folder), "model": {"text_precision": "bf16"}}
    assert look_at(stage_config(workshop, tmp_path, "distill", **half)).encoder_bytes == 4 * (100 + 5) + 2 * 7


def test_an_encoded_set_needs_no_encoders(workshop, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / INDEX).write_text('{"format": "longtake_encoded"}')
    (tmp_path / "set" / EMPTY_TEXT).touch()
    data = {"path": str(tmp_path / "set")}
    found = look_at(stage_config(workshop, tmp_path, "distill", encoders=str(tmp_path / "none"), data=data))
    assert found.encoder_bytes == 0 and not found.missing


def test_what_takes_its_time_is_told_before(workshop, tmp_path, quick, caplog):
    file = write(tmp_path, stage_tree(workshop, tmp_path, "causal"))
    for options in (["--json"], ["--json", "--quiet"]):
        caplog.clear()
        assert json.loads(invoke(file, *options).stdout)["stages"]
        assert ("causal: an iteration is traced without data" in caplog.text) == ("--quiet" not in options)


def test_what_is_missing_is_named_with_the_place_to_get_it(workshop, tmp_path, quick):
    folder = tmp_path / "Wan2.1-Fun-1.3B-InP"
    tree = stage_tree(workshop, tmp_path, "distill", init_from="causal", teacher=str(folder), encoders=str(folder))
    tree["data"]["path"] = str(tmp_path / "pictures")
    result = invoke(write(tmp_path, tree), "--json")
    assert result.exit_code == 1
    (stage,) = json.loads(result.stdout)["stages"]
    text = "\n".join(stage["missing"])
    assert f"teacher={folder} does not exist" in text
    command = f"longtake download alibaba-pai/Wan2.1-Fun-1.3B-InP -o {folder}"
    assert set(stage["downloads"]) == {command}
    assert "init_from=causal" in text and "train that stage first" in text
    assert f"encoders: {folder} has no VAE, no text encoder, no image encoder" in text and "data: " in text
    lines = invoke(write(tmp_path, tree)).output.split("\n\n")
    assert lines[0].startswith("PROBLEM: stage distill: missing ") and lines[0].count("PROBLEM") == len(
        stage["problems"]
    )
    # One list: weights and encoders are of one repository.
    assert lines[1] == f"to download:\n  {command}"
    assert stage["need_bytes"]["encoders"] == 0 and all(
        f"missing {line}" in stage["problems"] for line in stage["missing"]
    )


def test_encoders_of_no_known_folder_are_got_file_by_file(workshop, tmp_path):
    """Of each repository in one command."""
    found = look_at(stage_config(workshop, tmp_path, "distill", encoders=str(tmp_path / "none")))
    first, second = found.downloads
    assert first.startswith("hf download Wan-AI/Wan2.1-T2V-1.3B Wan2.1_VAE.pth models_t5_umt5-xxl-enc-bf16.pth google/")
    assert second.startswith("hf download Wan-AI/Wan2.1-I2V-14B-480P models_clip") and str(tmp_path / "none") in second


def test_the_tokenizer_is_missed_on_its_own(workshop, tmp_path):
    folder = shutil.copytree(workshop / "encoders", tmp_path / "encoders")
    (folder / "text_encoder" / "tokenizer_config.json").unlink()
    (line,) = look_at(stage_config(workshop, tmp_path, "distill", encoders=str(folder))).missing
    assert line.startswith("encoders: the tokenizer: tokenizer_config.json in ") and "text_encoder or " in line


def test_damaged_files_are_told_with_the_rest(workshop, tmp_path):
    """Each in its line, and no traceback: cut weights, JSON that is none, a text in the place of weights."""
    folder = shutil.copytree(workshop / "encoders", tmp_path / "encoders")
    weights = next((folder / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "vae" / "config.json").write_text("{")
    text = shutil.copy(tmp_path / "encoders" / "vae" / "config.json", tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    found = look_at(stage_config(workshop, tmp_path, "distill", encoders=str(folder)))
    assert [line.partition(";")[0] for line in found.missing] == [
        f"encoders: {weights} is cut short and cannot be read as safetensors",
        f"encoders: {folder}/vae/config.json is not valid JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
    ]
    assert found.encoder_bytes > 0 and found.sizes["generator"] == TEACHER
    found = look_at(stage_config(workshop, tmp_path, "distill", encoders=str(tmp_path)))
    assert any(f"{text} is JSON text and no weights" in line for line in found.missing)


def test_a_student_that_cannot_be_trained_on_says_why(workshop, tmp_path):
    """Refused by name, though nothing of it is here."""
    playable, refused = read_table()
    names = [refused[0].repository, next(one.model for one in playable if one.writes_apart)]
    for name, told in zip(names, ("cannot be played: ", "is two networks")):
        (line,) = look_at(stage_config(workshop, tmp_path, "distill", init_from=name)).missing
        assert line.startswith(f"weights init_from={name} ") and told in line


def test_encoders_count_in_their_precision_and_only_where_they_are_loaded(workshop, tmp_path):
    def counted(**changes):
        return look_at(stage_config(workshop, tmp_path, "distill", **changes)).encoder_bytes

    text = TextEncoder.load(workshop / "encoders" / "text_encoder")
    saved = counted() - counted(model={"text_precision": "bf16"})
    assert saved == 2 * sum(p.numel() for p in text.model.parameters())
    encode(stage_config(workshop, tmp_path, "distill"), tmp_path / "encoded", Mesh())
    gone = {"data": {"path": str(tmp_path / "encoded")}, "encoders": str(tmp_path / "gone")}
    found = look_at(stage_config(workshop, tmp_path, "distill", **gone))
    assert found.encoder_bytes == 0 and not found.missing


def test_weights_are_looked_for_where_training_does(workshop, tmp_path, monkeypatch):
    """Student files, weights without config.json, pipelines; a name of the hub is a note and fetches nothing."""
    state = load_dit(workshop / "teacher").state_dict()
    (tmp_path / "files").mkdir()
    shutil.copy(workshop / "teacher" / "config.json", tmp_path / "files")
    torch.save({"generator_ema": {f"model.{key}": value for key, value in state.items()}}, tmp_path / "files" / "s.pt")
    pipeline = shutil.copytree(workshop / "teacher", tmp_path / "pipeline" / "transformer").parent
    toy = shutil.copytree(TOY_ASSETS / "teacher", tmp_path / "bare")
    (toy / "config.json").unlink()
    sources = {"init_from": str(tmp_path / "files" / "s.pt"), "teacher": str(pipeline)}
    found = look_at(stage_config(workshop, tmp_path, "distill", **sources))
    assert set(found.sizes.values()) == {TEACHER} and not found.missing + found.notes
    bare = look_at(stage_config(workshop, tmp_path, "causal", init_from=str(toy)))
    assert bare.sizes == {"generator": PRESETS["toy"]} and not bare.missing
    torch.save({"generator": {"blocks.0.self_attn.q.weight": torch.zeros(1)}}, tmp_path / "files" / "s.pt")
    assert "missing (" in look_at(stage_config(workshop, tmp_path, "distill", **sources)).missing[0]
    monkeypatch.chdir(tmp_path)
    named = {"init_from": "someone/student", "teacher": "weights/Wan2.1-Fun-1.3B-InP"}
    found = look_at(stage_config(workshop, tmp_path, "distill", **named))
    assert "init_from=someone/student is no local path: it will be fetched" in found.notes[0]
    wanted = ["longtake download alibaba-pai/Wan2.1-Fun-1.3B-InP -o weights/Wan2.1-Fun-1.3B-InP"]
    assert found.downloads == wanted


def test_a_trained_stage_is_found_and_an_empty_one_is_not(workshop, tmp_path):
    config = stage_config(workshop, tmp_path, "distill", init_from="causal")
    (tmp_path / "causal").mkdir()
    assert "holds no complete checkpoint" in look_at(config).missing[0]
    save_student(stage_config(workshop, tmp_path, "causal"))
    assert look_at(config).missing == []


def test_a_job_writes_what_its_stages_read(tmp_path, quick):
    report = diagnose(JOB, [f"logdir={tmp_path}/new"])
    assert report.ok and quick == [("causal", 1), ("distill", 1)]
    assert invoke().exit_code == 0  # the machine alone


@pytest.fixture
def machine(monkeypatch):
    """`machine(**changes)`: diagnosis on a machine with other values."""
    real = look()

    def change(**changes):
        monkeypatch.setattr(module, "look", lambda: replace(real, **changes))

    return change


def test_what_does_not_fit_is_said_first_and_with_a_remedy(workshop, tmp_path, machine, quick):
    file = write(tmp_path, stage_tree(workshop, tmp_path, "distill"))
    need = diagnose(file).stages[0].need_bytes
    total = sum(need.values())
    assert need["working memory"] == 30 * MB and total == 60 * MB + need["encoders"]
    for free, remedy in ((total, "=full, which"), (total - 20 * MB, "=full, and use more GPUs")):
        machine(ram_free_bytes=free, gpus=[])
        report = diagnose(file)
        assert not report.ok and f"set activation_checkpointing{remedy}" in report.stages[0].problems[0]
        first = str(report).splitlines()[0]
        assert first.startswith("PROBLEM: stage distill: ") and "do not fit into" in first
    machine(ram_free_bytes=2 * int(1.2 * total), gpus=[])
    assert diagnose(file).ok and diagnose(file, gpus=2).ok  # two ranks share the memory


def test_other_machines(workshop, tmp_path, machine, quick):
    machine(ram_free_bytes=1, gpus=[])
    file = write(tmp_path, stage_tree(workshop, tmp_path, "distill"))
    for device, size in (("h100", 80), ("24GB", 24), ("32 gb", 32), ("4090", 24), ("rtx 3090", 24), ("RTX 5090", 32)):
        (stage,) = json.loads(invoke(file, "--device", device, "--gpus", 2, "--json").stdout)["stages"]
        assert stage["free_bytes"] == size * 10**9 and stage["ranks"] == 2 and not stage["problems"]
    for arguments, reason in (
        (
            ("--device", "TPU"),
            "--device TPU is not known; give H200, H100, A100, RTX 5090, RTX 4090, RTX 3090, or memory such as 24GB",
        ),
        (("--device", "0GB"), "--device 0GB is not known; give H200"),
        (("--gpus", 64), "batch_size=4 must be a multiple of 64 ranks"),
        (("--gpus", 0), "greater than or equal to 1"),
    ):
        result = invoke(file, *arguments)
        assert result.exit_code == 2 and reason in " ".join(result.output.split()), result.output


def test_gpus_are_counted_and_the_fullest_one_decides(workshop, tmp_path, machine, quick):
    file = write(tmp_path, stage_tree(workshop, tmp_path, "distill"))
    kernels = {"bfloat16": ["CUDNN_ATTENTION", "MATH"], "float32": ["MATH"]}
    gpus = [Gpu("Test 1", "9.0", 80 << 30, free, kernels) for free in (70 << 30, 1 << 20)]
    machine(gpus=gpus)
    report = diagnose(file)
    assert report.stages[0].ranks == 2 and report.stages[0].free_bytes == 1 << 20 and not report.ok
    assert "GPU 1: Test 1" in str(report) and "attention in bfloat16: CUDNN_ATTENTION, MATH" in str(report)
    machine(gpus=gpus[:1])
    assert diagnose(file).ok
    assert diagnose(file, gpus=2).problems == ["2 ranks are planned and this machine has 1 GPU(s); name --device"]


def test_missing_packages_disk_and_wrong_numbers(workshop, tmp_path, machine, quick, monkeypatch):
    machine(packages={**look().packages, "av": None})
    assert diagnose().problems == ["package av is not installed"] and not diagnose().ok
    monkeypatch.setattr(module, "free_disk", lambda _: 1000)
    file = write(tmp_path, stage_tree(workshop, tmp_path, "distill"))
    assert "lower keep_checkpoints" in diagnose(file).stages[0].problems[0]
    assert invoke(file, "max_step=3").exit_code == 2


def test_a_problem_of_several_stages_is_told_once(tmp_path, quick, machine):
    machine(ram_free_bytes=1, gpus=[])
    report = diagnose(JOB, [f"logdir={tmp_path}/new"])
    problems = [line for line in str(report).splitlines() if line.startswith("PROBLEM")]
    assert len(problems) == 1 and problems[0].startswith("PROBLEM: stage causal, distill: ")


def test_hours_and_price_are_measured_seconds_times_iterations(workshop, tmp_path, quick):
    tree = stage_tree(workshop, tmp_path, "distill", max_steps=3000)
    file, measured = write(tmp_path, tree), tmp_path / "bench.json"
    numbers = {"stage": "distill", "device": "NVIDIA H200", "ranks": 1, "cycle_s": 30.0, "cycle_iterations": 5}
    measured.write_text(json.dumps(numbers))
    told = invoke(file, "--seconds-from", measured, "--price", 3.5).output
    assert "6 s (NVIDIA H200) x 3000 iterations / 3600 = 5.0 hours" in told
    assert "x 1 GPU(s) x 3.5 an hour = 17.50" in told
    (stage,) = json.loads(invoke(file, "--seconds-from", measured, "--json").stdout)["stages"]
    assert stage["cost"]["seconds"] == 6 and stage["cost"]["price"] is None
    stream = {
        "device": "CPU",
        "ranks": 1,
        "plan": {"fps": 16},
        "fps": {"loop": 40.0},
    }  # of `longtake bench --model toy`
    right = f"`longtake bench {file} --json bench.json`"
    for found, reason in (
        (numbers | {"ranks": 2}, "was measured on 2 rank(s), and 1 are planned"),
        (numbers | {"cycle_s": None}, f"the bench was ended, or its iterations were too few; write it by {right}"),
        (numbers | {"cycle_iterations": 0}, "tells no seconds of a whole cycle (cycle_s 30.0, cycle_iterations 0)"),
        ({"stage": "distill", "ranks": 1}, "tells no seconds of a whole cycle (cycle_s None"),
        (numbers | {"stage": "causal"}, f"is of stage causal, and CONFIG has distill; write it by {right}"),
        (stream, f"is of a stream, and hours are those of a training: measure its stage by {right}"),
        ([3], "is of something else"),
    ):
        measured.write_text(json.dumps(found))
        result = invoke(file, "--seconds-from", measured)
        assert result.exit_code == 2 and reason in " ".join(result.output.split()), result.output
    measured.write_text("{")
    assert "cannot be read (Expecting" in invoke(file, "--seconds-from", measured).output
    measured.write_text(json.dumps(stream))
    assert "measure its stage by `longtake bench FILE_OF_THE_STAGE" in invoke(JOB, "--seconds-from", measured).output
    for wrong in ([file, "--price", 3], [file, "--seconds-from", tmp_path / "none"], ["--stream", "toy", "--gpus", 2]):
        assert invoke(*wrong).exit_code == 2
