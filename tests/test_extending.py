"""What docs/extending.md says of new objectives: its file and its recipe are run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from longtake.config import objective as kinds
from longtake.config.job import load_config
from longtake.errors import ConfigError
from longtake.run_folder import latest_checkpoint, trained_config
from longtake.train.metrics import read_rows

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "extending.md").read_text()


def block(language):
    return re.search(rf"^```{language}\n(.*?)^```", TEXT, re.M | re.S)[1]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder outside the package with the document's module and recipe, on the path of this process."""
    (tmp_path / "my_objectives.py").write_text(block("python"))
    (tmp_path / "recipe.yaml").write_text(block("yaml"))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_objectives", None)


def test_an_objective_outside_the_package_is_trained_by_the_command(workshop, outside):
    values = [f"logdir={outside}", f"init_from={workshop / 'teacher'}", f"encoders={workshop / 'encoders'}"]
    values += [f"data.path={workshop / 'data/clips'}", "video.num_latent_frames=5", "max_steps=3", "validate_every=0"]
    command = [sys.executable, "-m", "longtake", "train", str(outside / "recipe.yaml"), *values]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{outside}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=outside, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = read_rows(outside / "motion" / "metrics.jsonl")
    assert [row["generator_loss"] > 0 and row["generator_grad_norm"] > 0 for row in rows] == [True] * 3
    assert "speed/samples_per_second" in rows[-1] and "speed/model_tflops" not in rows[-1]
    config = trained_config(latest_checkpoint(outside / "motion" / "checkpoints"))
    assert config.objective.motion == 2.0 and not config.objective.causal


def test_its_keys_are_checked_when_the_recipe_is_read_without_torch(outside):
    with pytest.raises(ConfigError, match="objective.motion: got -1"):
        load_config(outside / "recipe.yaml", ["objective.motion=-1"])
    with pytest.raises(ConfigError, match="unknown key objective.motoin; did you mean objective.motion"):
        load_config(outside / "recipe.yaml", ["objective.motoin=1"])
    program = "import sys\nfrom longtake.config.job import load_config\nload_config('recipe.yaml')\n"
    program += "assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{outside}"}
    subprocess.run([sys.executable, "-c", program], cwd=outside, env=environment, check=True, timeout=60)


def test_in_the_package_it_is_one_line_more(outside, monkeypatch):
    monkeypatch.setitem(kinds.KINDS, "motion", "my_objectives:MotionConfig")
    tree = yaml.safe_load((outside / "recipe.yaml").read_text())
    tree["objective"]["kind"] = "motion"
    (outside / "short.yaml").write_text(yaml.safe_dump(tree))
    assert load_config(outside / "short.yaml").objective.motion == 2.0
    with pytest.raises(ConfigError, match="unknown key objective.motion; it belongs to objective.kind=motion"):
        load_config(ROOT / "configs/toy/causal.yaml", ["objective.motion=1"])
