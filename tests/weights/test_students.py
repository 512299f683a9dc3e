"""Published students: found by their files or by name, cleaned, read strictly, refused where their law is not ours."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from published_students import FILES, memory_of, merged, write_student
from tiny_sessions import PICTURE, A, B, take
from tiny_stage import make_encoders, make_model, save_encoders, stage_config
from tiny_wan import T2V
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.generation import read_rules
from longtake.doctor.files import look_at
from longtake.doctor.run import diagnose_stream
from longtake.errors import CheckpointError, ConfigError
from longtake.inference.generator import Generator
from longtake.inference.source import Source
from longtake.inference.video_io import read_video
from longtake.parallel.mesh import Mesh
from longtake.train.networks import Builder
from longtake.weights.config_json import config_to_json
from longtake.weights.load import load_dit, load_opened, save_dit
from longtake.weights.presets import PRESETS, shapes_of
from longtake.weights.students import TABLE, find_student, read_table

NAMES = list(FILES)
FROM_STUDENT = {"init_from": "Efficient-Large-Model/LongLive-1.3B", "model": {"image_condition": "t2v"}}
PLAN = {
    "plan": {"block_frames": 2, "first_frames": 2, "window_frames": 4, "sink_frames": 2},
    "video": {"height": 64, "width": 64, "num_latent_frames": 4},
}
SMALL = {"height": 32, "width": 32, "precision": "fp32"}


@pytest.fixture(scope="module")
def state():
    return {key: value.clone() for key, value in make_model(T2V).state_dict().items()}


def download(name, state, folder):
    """As `hf download` leaves it, with the sizes of the tiny model beside the weights."""
    file = write_student(name, state, folder)
    (file.parent / "config.json").write_text(json.dumps(config_to_json(T2V)))
    return file


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return save_encoders(make_encoders(), tmp_path_factory.mktemp("encoders"))


# ---- found and read --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_its_files_is_known_and_read_strictly(name, state, tmp_path, hub):
    file = download(name, state, tmp_path / "here")
    expected = merged(state) if name == "LongLive" else state
    for source in (tmp_path / "here", file):
        found = find_student(source)
        assert found is not None and (found.student.name, found.weights) == (name, file)
        assert f"{found.student.repository}/{found.student.file}" == FILES[name][0]
        loaded = load_opened(found.open()).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.allclose(loaded[key], value, atol=1e-6) for key, value in expected.items())
        if name != "LongLive":
            assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    assert hub.asked == []


@pytest.mark.parametrize("name", ["LongLive", "Self-Forcing (SiD v2)", "Causal-rCM (chunkwise, 2 steps)"])
def test_a_file_whose_name_tells_it_may_lie_anywhere(name, state, tmp_path):
    file = download(name, state, tmp_path / "repository")
    (tmp_path / "flat").mkdir()
    for one in file.parent.iterdir():
        if one.is_file():
            shutil.move(one, tmp_path / "flat")
    for source in (tmp_path / "flat", tmp_path / "flat" / file.name):
        found = find_student(source)
        assert found is not None and found.student.name == name
        found.open()


# One of each container and way of naming; the others differ from these by a file name
_FAST = ("Self-Forcing (DMD)", "CausVid (3 steps)", "Causal-rCM (framewise, 4 steps)")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in _FAST)) for n in NAMES])
def test_published_sizes_need_no_config(name, tmp_path):
    """All 825 tensors of Wan2.1-T2V-1.3B, of which each is one number in the file; updates are read as a whole."""
    shapes = shapes_of(PRESETS["wan2.1-t2v-1.3b"])
    hollow = {key: torch.zeros(1, dtype=torch.bfloat16).expand(shape) for key, shape in shapes.items()}
    write_student(name, hollow, tmp_path)
    found = find_student(tmp_path)
    assert len(shapes) == 825 and found is not None
    assert found.open().model.config == PRESETS["wan2.1-t2v-1.3b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_renamed_or_missing_key_is_refused_by_name(name, state, tmp_path):
    network = (FILES[name][1] or (None,))[0]
    for number, break_ in enumerate((lambda held, key: held.pop(key), lambda held, key: held.update(x=held.pop(key)))):
        file = download(name, state, tmp_path / str(number))
        content = torch.load(file, weights_only=True)
        held = content if network is None else content[network]
        key = next(key for key in held if key.endswith("blocks.1.cross_attn.norm_k.weight"))
        break_(held, key)
        torch.save(content, file)
        with pytest.raises(CheckpointError) as error:
            find_student(file).open()
        assert str(error.value).startswith(f"{name}, published as {FILES[name][0]}: ")
        assert "blocks.1.cross_attn.norm_k.weight" in str(error.value)


def test_two_networks_of_one_file(state, workshop, encoders, tmp_path):
    """SGF+: both are read strictly, what the second one lacks is the first one's, and neither is taken for the whole."""
    name = "Self-Gradient-Forcing+ (chunkwise)"
    file = download(name, state, tmp_path / "plus")
    content = torch.load(file, weights_only=True)
    prefix = "model._fsdp_wrapped_module."
    del content["generator_ema"][f"{prefix}blocks.0.norm3.memory_bias"]
    torch.save(content, file)
    source = Source.of_model(tmp_path / "plus", encoders, changes=SMALL)
    one, two = (load_opened(opened).state_dict() for opened in (source.open(), source.open_writer()))
    assert one.keys() == two.keys() == state.keys() and all(torch.equal(one[key], state[key]) for key in state)
    for key in state:
        expected = state[key] if key == "blocks.0.norm3.bias" else memory_of({key: state[key]})
        assert torch.equal(two[key], expected if torch.is_tensor(expected) else next(iter(expected.values()))), key
    generator = Generator.build(source, "cpu")
    assert all(torch.equal(a, two[key]) for key, a in generator.denoiser.writer.state_dict().items())
    made, alone = (list(g.stream(prompt=A, num_frames=33)) for g in (generator, _without_writer(source)))
    assert np.array_equal(made[0], alone[0]) and not np.array_equal(made[1], alone[1])
    content["generator_ema"][f"{prefix}blocks.0.self_attn.q.memory_scale"] = torch.ones(1)
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"Self-Gradient-Forcing\+.*blocks.0.self_attn.q.scale"):
        Generator.build(source, "cpu")
    result = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "plain"), "--to", "longtake"])
    assert result.exit_code == 2 and "is two networks" in result.output and not (tmp_path / "plain").exists()
    with pytest.raises(ConfigError, match="is two networks"):
        config = stage_config(
            workshop, tmp_path, "causal", init_from=str(file), model={"image_condition": "t2v"}, **PLAN
        )
        Builder(config, Mesh()).open(config.source(str(file)))


def _without_writer(source):
    generator = Generator.build(source, "cpu")
    generator.denoiser.writer = None
    return generator


def test_a_missing_network_or_update_is_refused_by_name(state, tmp_path):
    file = download("Self-Forcing (DMD)", state, tmp_path / "sf")
    content = torch.load(file, weights_only=True)
    torch.save({"generator": content["generator"]}, file)
    with pytest.raises(CheckpointError, match=r"Self-Forcing \(DMD\).*holds generator, not generator_ema"):
        find_student(file).open()
    download("LongLive", state, tmp_path / "ll").with_name("lora.pt").unlink()
    with pytest.raises(CheckpointError, match="LongLive is a base and updates, and .*lora.pt is not there"):
        find_student(tmp_path / "ll")


def test_several_students_in_one_folder_must_be_told_apart(state, tmp_path):
    chunk = download("Causal-Forcing (chunkwise)", state, tmp_path)
    download("Causal-Forcing (framewise)", state, tmp_path)
    with pytest.raises(
        ConfigError, match=r"holds several students; give one of them: --model \S+chunkwise/causal_forc"
    ):
        find_student(tmp_path)
    assert find_student(chunk).student.name == "Causal-Forcing (chunkwise)"


def test_other_weights_are_left_alone_and_own_rules_are_taken(state, encoders, tmp_path):
    torch.save({"generator": state}, tmp_path / "model.pt")
    assert find_student(tmp_path) is None and find_student("Wan-AI/Wan2.1-T2V-1.3B") is None
    assert find_student("gdhe17/Self-Forcing/checkpoints/ode_init.pt") is None and find_student("toy") is None
    file = download("Self-Forcing (DMD)", state, tmp_path / "sf")
    (file.parent / "generation.yaml").write_text("{shift: 3.0, height: 32, width: 32}")
    assert find_student(file).rules.shift == 3 and find_student(tmp_path / "sf").student.name == "Self-Forcing (DMD)"
    source = Source.of_model(tmp_path / "sf", encoders)  # and the file is read as its student's
    assert source.settings.shift == 3 and source.weights == file
    assert load_opened(source.open()).state_dict().keys() == state.keys()
    shutil.copy(file.parent / "generation.yaml", tmp_path / "sf")
    save_dit(T2V, state, tmp_path / "sf")  # weights of somebody's own in the folder itself
    assert find_student(tmp_path / "sf") is None


# ---- the hub ---------------------------------------------------------------------------------------------------------
def test_names_on_the_hub(state, encoders, hub, caplog):
    for name in ("efficient-large-model/longlive-1.3b", "LongLive", "longlive"):
        assert find_student(name).student.name == "LongLive"
    assert find_student("self-forcing (SID)").student.name == "Self-Forcing (SiD)"
    with pytest.raises(ConfigError, match="Self-Forcing holds several students.*--model gdhe17/Self-Forcing/checkpoin"):
        find_student("Self-Forcing")
    for name, (model, _) in FILES.items():
        assert find_student(model).student.name == name
    with pytest.raises(ConfigError, match="--model gdhe17/Self-Forcing/checkpoints/self_forcing_sid.pt"):
        find_student("gdhe17/Self-Forcing")
    repository, base = "Efficient-Large-Model/LongLive-1.3B", "Wan-AI/Wan2.1-T2V-1.3B"
    download("LongLive", state, hub(repository))
    source = Source.of_model(repository, changes=SMALL)
    assert hub.asked == []  # until it is needed
    with pytest.raises(CheckpointError, match=f"{base} is neither a local path nor a repository"):
        Generator.build(source, "cpu")
    assert hub.fetched == []  # nothing before all is known to be there
    shutil.copytree(encoders, hub(base))
    caplog.set_level("INFO")
    assert len(list(Generator.build(source, "cpu").stream(prompt=A, num_frames=9))) == 1
    assert sorted(hub.fetched[:3]) == ["models/config.json", "models/longlive_base.pt", "models/lora.pt"]
    assert {file.split("/")[0] for file in hub.fetched[3:]} == {"vae", "text_encoder"}
    size = sum(path.stat().st_size for path in hub(repository).rglob("*") if path.is_file()) / 1e6
    assert f"Fetching {repository}: transformer" in caplog.text and "low-rank updates" in caplog.text
    assert f"({size:.1f} MB)" in caplog.text and f"Fetching {base}: VAE" in caplog.text
    (hub(repository) / "models/lora.pt").unlink()
    with pytest.raises(CheckpointError, match=f"LongLive was models/lora.pt of {repository}, which is no longer there"):
        source.fetched()


def test_students_are_fetched_by_name_and_played_without_a_network(state, encoders, hub, tmp_path):
    download("LongLive", state, hub("Efficient-Large-Model/LongLive-1.3B"))
    shutil.copytree(encoders, hub("Wan-AI/Wan2.1-T2V-1.3B"))
    result = CliRunner().invoke(app, ["download", "LongLive", "-o", str(tmp_path / "here")])
    assert result.exit_code == 0 and f"longtake generate --model {tmp_path}/here" in result.output, result.output
    hub.offline = OSError("no network")
    found = Source.of_model(tmp_path / "here")
    assert found.student.student.name == "LongLive" and found.encoders == tmp_path / "here" / "encoders"
    assert found.fetched() is found and len(hub.asked) == 2
    result = CliRunner().invoke(app, ["download", "MemFlow"])
    assert result.exit_code == 2 and "MemFlow (" in result.output and "cannot be played" in result.output
    for name, said in (
        ("LongLiv", "did you mean LongLive or"),
        ("mine", "neither OWNER/NAME on the"),
        (str(tmp_path), "is a local path; give OWNER/NAME"),
    ):
        result = CliRunner().invoke(app, ["download", name])
        assert result.exit_code == 2 and said in result.output


@pytest.mark.whole
def test_a_student_is_converted_trained_from_and_planned_for(state, workshop, hub, tmp_path):
    download("LongLive", state, hub("Efficient-Large-Model/LongLive-1.3B"))
    result = CliRunner().invoke(app, ["convert", "LongLive", str(tmp_path / "plain"), "--to", "longtake"])
    assert result.exit_code == 0, result.output
    written = load_dit(tmp_path / "plain").state_dict()
    assert all(torch.allclose(written[key], value, atol=1e-6) for key, value in merged(state).items())
    assert read_rules(tmp_path / "plain") == read_table()[0][0].settings
    for source in ("Efficient-Large-Model/LongLive-1.3B", str(hub("Efficient-Large-Model/LongLive-1.3B"))):
        config = stage_config(workshop, tmp_path, "causal", init_from=source, model={"image_condition": "t2v"}, **PLAN)
        read = dict(Builder(config, Mesh()).open(config.source(source)).read(None))
        assert all(torch.allclose(read[key], value, atol=1e-6) for key, value in merged(state).items())
    lora = stage_config(workshop, tmp_path, "causal", **{**FROM_STUDENT, "lora": {"rank": 2}}, **PLAN)
    with pytest.raises(ConfigError, match="LongLive, a published student, .*`longtake convert .*, and name FOLDER"):
        Builder(lora, Mesh()).build()
    report = diagnose_stream("LongLive", device="80GB")
    assert "window 12" in str(report) or "plan.window_frames=12" in str(report)
    with_name = stage_config(workshop, tmp_path, "causal", **FROM_STUDENT, **PLAN)
    assert "is LongLive: it will be fetched from the Hugging Face hub" in "\n".join(look_at(with_name).notes)


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", read_table()[1], ids=lambda row: row.name)
def test_a_law_that_is_not_ours_is_refused_by_name(row, tmp_path):
    sources = [] if row.name.startswith(("Causal", "Self-Forcing")) else [row.repository]
    for file in row.files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        sources += [f"{row.repository}/{file}", tmp_path / file]
    assert sources
    for source in sources:
        with pytest.raises(ConfigError) as error:
            Source.of_model(source)
        assert row.name in str(error.value) and row.law in str(error.value) and row.needed in str(error.value)


def test_the_table_is_complete_and_listed():
    rows = yaml.safe_load(TABLE.read_text())
    students, refused = read_table()
    assert [student.name for student in students] == NAMES and len({row.repository for row in refused}) >= 9
    for row in [*rows["students"], *rows["refused"]]:
        assert row["licence"] and row["source"]
    result = CliRunner().invoke(app, ["students"])
    assert result.exit_code == 0
    for row in [*students, *refused]:
        assert row.name in result.output and row.licence in result.output
    for row in refused:
        assert row.law in result.output


# ---- played ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_each_is_generated_from_scripted_forked_and_rewound(name, state, encoders, tmp_path):
    download(name, state, tmp_path)
    generator = Generator.from_model(tmp_path, "cpu", encoders=encoders, changes=SMALL)
    first = 1 if generator.plan.block_frames == 1 else 9
    straight = take(generator.open(prompt=A), 4)
    assert len(straight) == first + 3 * 4 * generator.plan.block_frames
    assert np.array_equal(np.concatenate(list(generator.stream(prompt=A, num_frames=len(straight)))), straight)
    session = generator.open(prompt=A, history_blocks=2)
    take(session, 3)
    branch = session.fork()
    branch.prompt = B
    assert np.array_equal(take(session, 1), straight[-4 * generator.plan.block_frames :])
    assert len(take(branch, 1)) == 4 * generator.plan.block_frames
    session.rewind(1)
    assert np.array_equal(take(session, 1), straight[-4 * generator.plan.block_frames :])
    given = generator.open(PICTURE, A)
    assert len(given.next()) == (9 if generator.beginning.picture == "still" else 1)
    assert generator.beginning.zero_shot(given=True)


def test_the_command_finds_all_of_it_offline(state, encoders, tmp_path, hub):
    download("LongLive", state, tmp_path / "LongLive-1.3B")
    shutil.copytree(encoders, tmp_path / "Wan2.1-T2V-1.3B")
    (tmp_path / "story.yaml").write_text(
        yaml.safe_dump({"prompt": A, "frames": 33, "events": [{"frame": 9, "prompt": B}]})
    )
    Image.fromarray(PICTURE).save(tmp_path / "p.png")
    small = ["--model", str(tmp_path / "LongLive-1.3B"), "--height", "32", "--width", "32", "--device", "cpu"]
    for more, frames, said in (
        (["--prompt", A, "--frames", "17"], 17, ""),
        (["--script", str(tmp_path / "story.yaml")], 33, ""),
        (["--prompt", A, "--frames", "17", "--image", str(tmp_path / "p.png")], 17, "zero-shot image-to-video"),
    ):
        result = CliRunner().invoke(app, ["generate", *small, *more, "-o", str(tmp_path / "o.mp4"), "--overwrite"])
        assert result.exit_code == 0 and said in result.output, result.output
        assert len(read_video(tmp_path / "o.mp4")[0]) == frames
    assert hub.asked == []


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "LongLive")) for n in NAMES])
def test_the_commands_script_play_and_evaluate_each(name, state, encoders, tmp_path):
    download(name, state, tmp_path / "student")
    events = [{"frame": 9, "prompt": B}]
    (tmp_path / "story.yaml").write_text(yaml.safe_dump({"prompt": A, "frames": 33, "events": events}))
    (tmp_path / "prompts.txt").write_text(f"{A}\n")
    small = [f"{key}={value}" for key, value in SMALL.items()]
    from_here = ["--model", str(tmp_path / "student"), "--encoders", str(encoders), "--device", "cpu", *small]

    def command(*words, **more):
        result = CliRunner().invoke(app, [words[0], *from_here, *map(str, words[1:])], **more)
        assert result.exit_code == 0, result.output

    command("generate", "--script", tmp_path / "story.yaml", "-o", tmp_path / "story.mp4")
    assert len(read_video(tmp_path / "story.mp4")[0]) == 33
    command("play", "--prompt", A, "--seconds", "2", "-o", tmp_path / "play.mp4", input=f"{B}\n")
    assert len(read_video(tmp_path / "play.mp4")[0]) >= 32
    command("evaluate", "--data", tmp_path / "prompts.txt", "-o", tmp_path / "report", "num_latent_frames=9")
    (video,) = json.loads((tmp_path / "report/evaluation.json").read_text())["videos"]
    assert video["frames"] == 33
