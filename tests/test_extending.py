"""What docs/extending.md says: its programs and its recipe are run as they stand there."""

import ast
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_sessions import PICTURE, A, make_generator
from tiny_stage import TEACHER, stage_config
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config import objective as kinds
from longtake.config.job import load_config
from longtake.errors import ConfigError
from longtake.inference.generator import Generator
from longtake.parallel.mesh import Mesh
from longtake.run_folder import latest_checkpoint, trained_config
from longtake.toy.world import sample_world
from longtake.train.metrics import read_rows
from longtake.train.stage import run_stage
from longtake.weights.load import WEIGHTS, save_dit

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "extending.md").read_text()


def block(language, title="An objective"):
    """The first block of code of a section."""
    section = TEXT[TEXT.index(f"## {title}") :]
    return re.search(rf"^```{language}\n(.*?)^```", section, re.M | re.S)[1]


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
    done = CliRunner().invoke(app, ["train", str(outside / "recipe.yaml"), *values])
    assert done.exit_code == 0, done.output
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


# ---- a transformer ---------------------------------------------------------------------------------------------------
def touched():
    """Files of the package that the document names, and what it says of each."""
    section = TEXT[TEXT.index("## A transformer") :]
    return dict(re.findall(r"^\| `([\w/]+\.py)` \| (.*) \|$", section, re.M))


def test_a_transformer_is_made_where_the_document_says():
    package = ROOT / "longtake"
    assert len(touched()) == 10 and all((package / name).is_file() for name in touched())
    makers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "VideoDiT":
                makers.add(path.relative_to(package).as_posix())
    assert makers == {name for name, said in touched().items() if said.startswith("makes it")}


def test_a_transformer_outside_the_package_is_trained_and_streams(workshop, tmp_path, monkeypatch):
    given: dict = {}
    exec(compile(block("python", "A transformer"), "my_transformer.py", "exec"), given)
    for name, said in touched().items():
        if said.startswith("makes it"):
            module = import_module("longtake." + name.removesuffix(".py").replace("/", "."))
            monkeypatch.setattr(module, "VideoDiT", given["ScaledDiT"])
    published = load_file(workshop / "teacher" / WEIGHTS)
    own = {f"blocks.{layer}.scale": torch.ones(TEACHER.dim) for layer in range(TEACHER.num_layers)}
    save_dit(TEACHER, published | own, tmp_path / "teacher")
    config = stage_config(workshop, tmp_path, "causal", init_from=str(tmp_path / "teacher"), max_steps=2)
    run_stage(config, Mesh())
    student = Generator.from_run(tmp_path, "cpu")
    assert type(student.model) is given["ScaledDiT"]
    trained = student.model.state_dict()
    assert all((trained[name] - value).abs().max() > 1e-5 for name, value in own.items())
    frames = list(student.stream(sample_world(0, 0).render(1)[0], "a red circle", num_frames=17))
    assert [len(part) for part in frames] == [1, 8, 8]


# ---- a decoder -------------------------------------------------------------------------------------------------------
def test_a_decoder_outside_the_package_makes_the_frames(tmp_path):
    given: dict = {}
    exec(compile(block("python", "A decoder"), "my_decoder.py", "exec"), given)
    generator = make_generator()
    vae = generator.encoders.vae
    matrix = torch.randn(vae.latent_channels, 3, generator=torch.Generator().manual_seed(0))
    generator.decoder = given["ColourDecoder"](vae, matrix)
    frames = np.concatenate(list(generator.stream(PICTURE, A, num_frames=21)))
    side = (32 // vae.spatial_stride, vae.spatial_stride)
    made = frames[1:].reshape(5, vae.temporal_stride, *side, *side, 3)
    assert (made == made[:, :1, :, :1, :, :1]).all() and made.std() > 5  # one colour a latent pixel
    session = generator.open(PICTURE, A, history_blocks=2)
    taken = [session.next() for _ in range(2)]
    session.save(tmp_path / "session.safetensors")
    resumed = generator.resume(tmp_path / "session.safetensors")
    assert np.array_equal(resumed.next(), session.next())
    assert np.array_equal(np.concatenate(taken), frames[: sum(map(len, taken))])
