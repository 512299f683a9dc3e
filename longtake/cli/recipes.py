"""`longtake recipes`: what ships to train by name, and copies of it to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from longtake.cli.common import Overwrite, clean_errors
from longtake.errors import nearest


class Names(TyperGroup):
    """The commands of `longtake recipes`; another word is the name of a recipe, of which `one` tells."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the words mean."""
        if args[0] not in self.commands and not nearest(args[0], self.commands):
            args = ["one", *args]
        return super().resolve_command(ctx, args)


recipes = typer.Typer(
    name="recipes",
    cls=Names,
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


@recipes.command(hidden=True)
def one(
    context: typer.Context, name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a recipe, e.g. toy/i2v.")]
) -> None:
    """Say what a recipe is, where its file lies, and how it is trained."""
    with clean_errors(context):
        from longtake.config.recipes import recipe_file, summary

        file = recipe_file(name)
        typer.echo(f"{name}  {summary(name)}\n  {file}\n  longtake train {name}\n  longtake recipes copy {name}")
