"""Every YAML file that ships is read, valid, and says nothing that the rest of the package contradicts."""

from pathlib import Path

import pytest

from longtake.config.base import read_recipe
from longtake.config.job import JobConfig, load_config
from longtake.config.stage import StageConfig, dump

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("[!_]*.yaml"))  # `_*.yaml` are no recipes: others extend them


def test_there_are_recipes():
    assert {path.name for path in (CONFIGS / "toy").iterdir()} >= {
        "teacher.yaml",
        "causal.yaml",
        "distill.yaml",
        "i2v.yaml",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_recipe_is_valid_and_reads_back(path, tmp_path):
    config = load_config(path)
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    for stage in config.stages.values() if isinstance(config, JobConfig) else [config]:
        assert stage.accumulation(1) >= 1


def test_each_file_names_only_what_it_changes():
    """No value is what the extended file says already, and every file that is no recipe is extended by one."""

    def leaves(tree, path=()):
        for key, value in tree.items():
            yield from leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]

    used = set()
    for file in FILES:
        said = {}
        for source, tree in read_recipe(file)[1]:
            own = dict(leaves(tree))
            assert not [key for key, value in own.items() if key in said and said[key] == value], source
            said |= own
            used.add(source.resolve())
    assert {path.resolve() for path in CONFIGS.rglob("_*.yaml")} <= used


def test_main_job_runs_on_two_ranks_over_at_least_two_blocks():
    job = load_config(CONFIGS / "toy" / "i2v.yaml")
    assert isinstance(job, JobConfig) and list(job.stages) == ["causal", "distill"]
    for stage in job.stages.values():
        assert stage.accumulation(2) >= 1
        assert stage.video.num_latent_frames >= 9 and stage.plan.num_blocks(stage.video.num_latent_frames) >= 3
        assert stage.video.num_pixel_frames >= 33
        assert not stage.wandb.enabled
    assert job.evaluation.num_worlds >= 32


def test_toy_recipes_agree_on_what_weights_are_bound_to():
    stages = [load_config(CONFIGS / "toy" / f"{name}.yaml") for name in ("teacher", "causal", "distill", "long")]
    assert all(isinstance(stage, StageConfig) for stage in stages)
    for key in ("model", "plan", "rope", "encoders", "logdir"):
        assert len({str(getattr(stage, key)) for stage in stages}) == 1, key
    teacher, causal, *scored = (stage.video.model_dump() for stage in stages)
    assert all(video == teacher for video in scored)  # windows of the teacher's length
    assert causal | {"num_latent_frames": 9} == teacher
    assert causal["num_latent_frames"] > stages[1].plan.window_frames  # eviction is part of training
