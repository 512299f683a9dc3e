"""The recipes that come with the package, by name: `toy/i2v` is `longtake/recipes/toy/i2v.yaml`."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from longtake.config.base import read_recipe
from longtake.errors import ConfigError, nearest
from longtake.outputs import check_output_file, writing

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """The names of all recipes; files that begin with `_` are what several of them share."""
    return sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.rglob("[!_]*.yaml"))


def find_recipe(given: str | Path) -> Path:
    """The file that is meant by a path, which goes first, or by the name of a recipe. Raises: ConfigError."""
    path, names = Path(given), recipe_names()
    if path.is_file():
        return path
    if path.as_posix() in names:
        return RECIPES / f"{path.as_posix()}.yaml"
    near = nearest(path.as_posix().removeprefix("configs/").removesuffix(".yaml"), names)
    raise ConfigError(
        f"config {path} is not a file, and no recipe is called so{near or ';'} `longtake recipes` lists them"
    )


def recipe_file(name: str) -> Path:
    """The file of a recipe that comes with the package. Raises: ConfigError that brings the nearest name."""
    if name not in (names := recipe_names()):
        near = nearest(name, names) or ";"
        raise ConfigError(f"no recipe is called {name}{near} `longtake recipes` lists them")
    return RECIPES.resolve() / f"{name}.yaml"


def summary(name: str) -> str:
    """What the head of a recipe's file says first of it."""
    head = takewhile(lambda line: line.startswith("#"), (RECIPES / f"{name}.yaml").read_text("utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in head).partition(". ")[0].rstrip(".")


def files_of(recipe: Path) -> list[Path]:
    """The file of a recipe and all those that it reads: what it extends, the stages of a job."""
    tree, sources = read_recipe(recipe)
    found = [file for file, _ in sources]
    for stage in tree.get("stages", {}).values():
        found += files_of(recipe.parent / stage)
    return sorted({file.resolve() for file in found})


def copy_recipe(name: str, folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Copies a recipe into `folder`, with the files that it reads, and returns the copies, the recipe first.

    Raises: ConfigError for a name that there is not; OutputError when one of the files is there already, before any is
    written, unless `overwrite` is given.
    """
    recipe = recipe_file(name)
    copies = {folder / file.relative_to(RECIPES.resolve()): file for file in files_of(recipe)}
    for copy in copies:
        copy.parent.mkdir(parents=True, exist_ok=True)
        check_output_file(copy, overwrite=overwrite)
    for copy, file in copies.items():
        with writing(copy):
            copy.write_bytes(file.read_bytes())
    return sorted(copies, key=lambda copy: copies[copy] != recipe)
