"""Recipes by name: in every command that takes a file, listed and copied; the wheel carries them."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.job import load_config
from longtake.config.recipes import copy_recipe, find_recipe, recipe_names
from longtake.errors import ConfigError

ROOT = Path(__file__).parent.parent


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_recipe_has_a_name_under_which_it_is_what_its_file_says():
    files = sorted((ROOT / "configs").rglob("[!_]*.yaml"))
    assert [f"configs/{name}.yaml" for name in recipe_names()] == [file.relative_to(ROOT).as_posix() for file in files]
    for file in files:
        name = file.relative_to(ROOT / "configs").as_posix().removesuffix(".yaml")
        assert load_config(name) == load_config(file)


def test_a_file_goes_before_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    assert find_recipe("toy/i2v").parts[-3:] == ("recipes", "toy", "i2v.yaml")
    (tmp_path / "toy/i2v").write_text("")
    assert find_recipe("toy/i2v") == Path("toy/i2v")


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("toy/iv2", "did you mean toy/i2v?"),
        ("i2v", "did you mean toy/i2v"),
        ("configs/toy/i2v.yaml", "did you mean toy/i2v?"),  # as in a clone
        ("wan/i2v-1-3b/distill", "did you mean wan/i2v_1_3b/distill"),
        ("Toy/Distill", "did you mean toy/distill"),
        ("nothing at all", None),
    ],
)
def test_a_name_that_there_is_not_brings_the_nearest(given, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["train", given], ["doctor", given], ["encode", given, "-o", "out"], ["bench", given]):
        refused = invoke(*words)
        assert refused.exit_code == 2 and f"config {given} is not a file" in refused.output, words
        assert "`longtake recipes` lists them" in refused.output
        assert near in refused.output if near else "did you mean" not in refused.output
    assert not list(tmp_path.iterdir())


def test_the_list_says_what_each_recipe_is():
    shown = invoke("recipes")
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    for line in lines:
        assert re.fullmatch(r"\S+  +\S.{20,}[^.,:]", line), line


@pytest.mark.parametrize("name", recipe_names())
def test_a_copy_is_the_same_recipe_and_complete(name, tmp_path):
    files = copy_recipe(name, tmp_path / "mine")
    assert files[0] == tmp_path / "mine" / f"{name}.yaml"
    assert load_config(files[0]) == load_config(name)
    assert sorted(files) == sorted(path for path in (tmp_path / "mine").rglob("*") if path.is_file())


def test_copying_replaces_nothing_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = invoke("recipes", "copy", "toy/i2v")
    assert made.exit_code == 0, made.output
    assert made.output.splitlines()[0] == "recipes/toy/i2v.yaml" and len(made.output.splitlines()) == 4
    Path("recipes/toy/i2v.yaml").unlink()
    Path("recipes/toy/causal.yaml").write_text("mine")
    refused = invoke("recipes", "copy", "toy/i2v")
    assert refused.exit_code == 2 and "exists already; name another" in refused.output
    assert Path("recipes/toy/causal.yaml").read_text() == "mine" and not Path("recipes/toy/i2v.yaml").exists()
    assert invoke("recipes", "copy", "toy/i2v", "--overwrite").exit_code == 0
    assert load_config("recipes/toy/i2v.yaml") == load_config("toy/i2v")
    refused = invoke("recipes", "copy", "toy/iv2")
    assert refused.exit_code == 2 and "did you mean toy/i2v?" in refused.output
    with pytest.raises(ConfigError, match="no recipe is called"):
        copy_recipe("../recipes/toy/i2v", tmp_path)


def test_a_name_behind_recipes_tells_of_that_one_or_brings_the_nearest():
    told = invoke("recipes", "toy/i2v")
    assert told.exit_code == 0 and "longtake train toy/i2v" in told.output and "recipes/toy/i2v.yaml" in told.output
    refused = invoke("recipes", "toy/i2w")
    assert refused.exit_code == 2 and "no recipe is called toy/i2w; did you mean toy/i2v" in refused.output
    assert "Did you mean 'copy'?" in invoke("recipes", "cpoy", "toy/i2v").output
    assert "one" not in invoke("recipes", "--help").output.split("Commands")[1]
