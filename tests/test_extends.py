"""Recipes that share values by `extends`: what is merged, what replaces, and which file an error names."""

import pytest
import yaml

from longtake.config.base import read_recipe
from longtake.config.generation import read_stage
from longtake.config.job import JobConfig, load_config
from longtake.config.stage import StageConfig, dump
from longtake.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write(name, tree):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(tree))
        return path

    write(
        "_base.yaml", {"init_from": "toy", "max_steps": 10, "data": {"path": "d"}, "optim": {"lr": 1e-3, "beta1": 0.5}}
    )
    write(
        "causal.yaml",
        {"extends": "_base.yaml", "objective": {"kind": "teacher_forcing"}, "name": "causal", "logdir": "out"},
    )
    return write


def test_mappings_are_merged_and_all_else_replaces(write):
    write("a.yaml", {"m": {"x": {"u": 1, "v": 2}, "list": [1, 2], "gone": {"k": 1}}, "text": "a", "keep": 0})
    write("b/b.yaml", {"extends": "../a.yaml", "m": {"x": {"v": 3, "w": {"z": 4}}, "list": [5], "gone": None}})
    path = write("b/c.yaml", {"extends": "b.yaml", "m": {"gone": {"n": 6}, "list": {"now": 7}}, "text": None})
    tree, sources = read_recipe(path)
    merged = {"x": {"u": 1, "v": 3, "w": {"z": 4}}, "list": {"now": 7}, "gone": {"n": 6}}
    assert tree == {"m": merged, "text": None, "keep": 0}
    assert [file.name for file, _ in sources] == ["a.yaml", "b.yaml", "c.yaml"]


def test_a_stage_is_the_same_as_written_in_full(write, tmp_path):
    full = {
        "objective": {"kind": "teacher_forcing"},
        "name": "causal",
        "logdir": "out",
        "init_from": "toy",
        "max_steps": 20,
    }
    full |= {"data": {"path": "d"}, "optim": {"lr": 2e-3, "beta1": 0.5}}
    config = load_config(write("sub/long.yaml", {"extends": "../causal.yaml", "max_steps": 20, "optim": {"lr": 2e-3}}))
    assert isinstance(config, StageConfig) and config == load_config(write("full.yaml", full))
    assert "extends" not in dump(config) and read_stage(tmp_path / "sub/long.yaml") == config
    changed = load_config(tmp_path / "sub/long.yaml", ["optim.lr=3e-3", "plan.window_frames=null"])
    assert (changed.optim.lr, changed.optim.beta1, changed.plan.window_frames) == (3e-3, 0.5, None)


def test_a_job_finds_its_stages_from_the_file_that_names_them(write):
    write("sub/job.yaml", {"logdir": "run", "stages": {"causal": "../causal.yaml"}, "data": {"num_worlds": 3}})
    job = load_config(write("job.yaml", {"extends": "sub/job.yaml", "data": None}), ["causal.max_steps=7"])
    assert isinstance(job, JobConfig) and job.data is None
    assert (job.stages["causal"].max_steps, job.stages["causal"].logdir) == (7, "run")
    for override in ("stages=null", "stages=3", "stages.causal=null"):
        with pytest.raises(ConfigError, match=r"stages(.causal)?: got"):
            load_config(write("job.yaml", {"extends": "sub/job.yaml"}), [override])
    write("sub/part.yaml", {"logdir": "r", "stages": {"causal": {"extends": "../causal.yaml", "optim": {"lr": 5e-3}}}})
    part = load_config(write("more.yaml", {"extends": "sub/part.yaml", "stages": {"causal": {"max_steps": 8}}}))
    stage = part.stages["causal"]
    assert (stage.optim.lr, stage.optim.beta1, stage.max_steps, stage.logdir) == (5e-3, 0.5, 8, "r")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("gone.yaml", r"config .*c.yaml extends gone.yaml, but .*gone.yaml is no file"),
        (".", "is no file"),
        ("", "is no file"),
        ("~nobody-here/x.yaml", "names no home folder"),
        ("n" * 300, "is no path"),
        ("c.yaml", r"config .*c.yaml extends .*c.yaml: a loop"),
        ("d.yaml", r"config .*c.yaml extends .*d.yaml extends .*e.yaml extends .*d.yaml: a loop; take one"),
        ("list.yaml", r"list.yaml must be a mapping"),
        (["a.yaml", "b.yaml"], r"extends: got \['a.yaml', 'b.yaml'\]; must be the path of one YAML file"),
        (3, r"extends: got 3; must be the path"),
        (None, "max_steps: missing"),
    ],
)
def test_a_wrong_base_is_refused(write, base, message):
    write("d.yaml", {"extends": "e.yaml"})
    write("e.yaml", {"extends": "./d.yaml"})
    write("list.yaml", [1])
    with pytest.raises(ConfigError, match=message):
        load_config(
            write("c.yaml", {"extends": base, "objective": {"kind": "teacher_forcing"}, "name": "c", "logdir": "o"})
        )


def test_errors_name_the_file_of_a_key_unless_it_is_the_recipe_itself(write, tmp_path):
    write("_base.yaml", {"optim": {"lrr": 1, "lr": -1}, "data": {"path": "d"}, "max_steps": 5, "zzz": 1})
    own = write("own.yaml", {"extends": "causal.yaml", "init_from": "toy", "seed": "x", "ema": {"decays": 1}})
    with pytest.raises(ConfigError) as error:
        load_config(own, ["zzz=2"])
    lines = {
        line.removeprefix("unknown key ").split(":")[0].split(";")[0]: line for line in str(error.value).splitlines()
    }
    base = f"(in {tmp_path / '_base.yaml'})"
    assert {key for key, line in lines.items() if line.endswith(base)} == {"optim.lrr", "optim.lr"}
    assert set(lines) == {"optim.lrr", "optim.lr", "seed", "ema.decays", "zzz"} and str(error.value).count("(in ") == 2
    with pytest.raises(
        ConfigError, match=r"stages.causal.seed.*\(in .*own.yaml\)(.|\n)*stages.causal.zzz.*_base.yaml\)"
    ):
        load_config(write("job.yaml", {"logdir": "r", "stages": {"causal": "own.yaml"}}))


@pytest.mark.parametrize("override", ["extends=_base.yaml", "optim.extends=_base.yaml"])
def test_extends_is_a_key_of_files_alone(write, tmp_path, override):
    with pytest.raises(ConfigError, match="unknown key (optim.)?extends"):
        load_config(tmp_path / "causal.yaml", [override])
    with pytest.raises(ConfigError, match="unknown key data.extends"):
        load_config(write("c.yaml", {"extends": "causal.yaml", "data": {"extends": "_base.yaml"}}))


def test_a_base_alone_is_no_recipe(tmp_path, write):
    with pytest.raises(ConfigError, match="neither `objective:`"):
        load_config(tmp_path / "_base.yaml")


def test_mappings_that_hold_themselves_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &x {b: *x}\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nstage: causal\na: &x {b: *x}\n")
    with pytest.raises(ConfigError, match="b.yaml: a mapping of it holds itself"):
        load_config(tmp_path / "b.yaml")
