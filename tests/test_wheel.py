"""The package as others get it: a wheel, installed into an environment of its own, with no repository beside it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import longtake
from longtake.config.recipes import recipe_names
from longtake.inference.video_io import read_video

ROOT = Path(__file__).parent.parent
USER_FILE = """
from pathlib import Path

import longtake

generator = longtake.Generator.from_model("toy", "cpu")
video = generator.video("frame.png", "a red circle climbs", seconds=2, output="out.mp4")
reveal_type(video)
path: Path = video.save("again.mp4")
session = generator.open("frame.png", "a red circle climbs")
session.prompt = "a red circle falls"
for block in session:
    reveal_type(block.shape)
rows = longtake.open_dataset("pictures")
reveal_type(rows[0].prompt)
seconds: float = "two"  # wrong
generator.vidoe("frame.png")  # wrong
longtake.Generater  # wrong
"""


def clean() -> dict[str, str]:
    """The environment without what would lead back to the repository."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MYPYPATH"))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what is built from."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "longtake", source / "longtake", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", out, source], check=True, timeout=250)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """A virtual environment with the wheel; it sees the libraries of this one, but not its longtake."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=100)
    python = folder / "venv/bin/python"
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], check=True, timeout=200
    )
    (own,) = (folder / "venv/lib").glob("*/site-packages")
    (own / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.copy(ROOT / "examples/first_frame.png", folder / "frame.png")
    return folder


def run(folder: Path, *words: str) -> str:
    command = [folder / "venv/bin/longtake", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=clean(), timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_carries_what_the_package_reads_and_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (file.read(name).decode() for name in names if name.endswith("METADATA"))
    read = [*(ROOT / "longtake").rglob("*.yaml"), *(ROOT / "longtake/assets").rglob("*"), ROOT / "longtake/py.typed"]
    assert {path.relative_to(ROOT).as_posix() for path in read if path.is_file()} <= names
    assert not [name for name in names if name.startswith(("tests/", "configs", "benchmarks/"))]
    for line in ("Classifier: Typing :: Typed", "License-Expression: Apache-2.0", "License-File: LICENSE"):
        assert f"\n{line}\n" in metadata


@pytest.mark.whole
def test_it_works_without_the_repository(elsewhere):
    place = "import longtake, pathlib; print(pathlib.Path(longtake.__file__).parent)"
    python = elsewhere / "venv/bin/python"
    said = subprocess.run([python, "-c", place], capture_output=True, text=True, cwd=elsewhere, env=clean(), timeout=60)
    assert Path(said.stdout.strip()).is_relative_to(elsewhere)
    assert run(elsewhere, "--version") == f"longtake {longtake.__version__}\n"
    assert [line.split()[0] for line in run(elsewhere, "recipes").splitlines()] == recipe_names()
    assert "stages:" in run(elsewhere, "train", "toy/i2v", "--check", "distill.max_steps=3")
    assert run(elsewhere, "recipes", "copy", "toy/distill").startswith("recipes/toy/distill.yaml\n")
    words = ["--image", "frame.png", "--prompt", "a red circle climbs", "--frames", "9", "--device", "cpu"]
    run(elsewhere, "generate", "--model", "toy", *words, "-o", "out.mp4")
    assert read_video(elsewhere / "out.mp4")[0].shape == (9, 64, 64, 3)


@pytest.mark.slow  # mypy reads torch: a minute, beside other work many
@pytest.mark.timeout(1200)
def test_a_type_checker_knows_the_public_names(elsewhere):
    (elsewhere / "user.py").write_text(USER_FILE)
    options = ["--python-executable", elsewhere / "venv/bin/python", "--cache-dir", elsewhere / "cache"]
    command = [sys.executable, "-m", "mypy", *options, "user.py"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=clean(), timeout=1100).stdout
    wrong = [number for number, line in enumerate(USER_FILE.splitlines(), 1) if line.endswith("# wrong")]
    assert [int(line.split(":")[1]) for line in said.splitlines() if ": error:" in line] == wrong, said
    for revealed in ("longtake.inference.video.Video", "tuple[Any, ...]", "str"):
        assert f'Revealed type is "{revealed}"' in said.replace("builtins.", ""), said
