"""`longtake recipes`: what ships to train by name, and copies of it to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longtake.cli.common import Overwrite, clean_errors

recipes = typer.Typer(
    name="recipes",
    help="List the recipes that `longtake train NAME` knows; `copy` gives one to change.",
    no_args_is_help=False,
)


@recipes.callback(invoke_without_command=True)
def show(context: typer.Context) -> None:
    """List the recipes that `longtake train NAME` knows; `copy` gives one to change."""
    if context.invoked_subcommand is not None:
        return
    with clean_errors(context):
        from longtake.config.recipes import recipe_names, summary

        names = recipe_names()
        width = max(map(len, names))
        for name in names:
            typer.echo(f"{name:{width}}  {summary(name)}")


@recipes.command()
def copy(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a recipe, e.g. toy/i2v.")],
    folder: Annotated[Path, typer.Argument(help="Folder to copy to.")] = Path("recipes"),
    overwrite: Overwrite = False,
) -> None:
    """Copy a recipe with all files that it reads, to change it and to train it by the path of the copy."""
    with clean_errors(context):
        from longtake.config.recipes import copy_recipe

        for file in copy_recipe(name, folder, overwrite=overwrite):
            typer.echo(str(file))
