"""What commands share: options, what is said of an error and the exit code, where weights are."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longtake.errors import ConfigError, LongtakeError, is_out_of_memory
from longtake.outputs import refusal
from longtake.progress import shown

if TYPE_CHECKING:
    from longtake.inference.source import Source
    from longtake.parallel.mesh import Mesh

Run = Annotated[Path | None, typer.Option(help="Log folder or stage folder of a training run.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default a GPU if there is one.")]
Decoder = Annotated[
    str | None, typer.Option(help="exact (the VAE), tiny (TAEHV, LightTAE) or light (LightVAE): what makes pixels.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file, too.")]
DecodeDevice = Annotated[str | None, typer.Option(help="Another GPU that decodes beside the transformer, e.g. cuda:1.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already; never an input.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but warnings and errors.")]
WarmUp = Annotated[bool, typer.Option("--warm-up", help="Compile, choose and record all kernels before the picture.")]
Rules = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Any values of `longtake config generation`: plan.window_frames=21 ..."),
]

EXIT_ERROR, EXIT_CONFIG, EXIT_INTERRUPTED = 1, 2, 130
# What becomes of the work of a command that Ctrl-C ends
_INTERRUPTED = {
    "train": "started again, it goes on from its last checkpoint",
    **dict.fromkeys(("encode", "teacher-data"), "started again, it goes on where it was"),
    "generate": "all finished videos are kept, and nothing was written of another; started again, it makes the others",
    "play": "nothing was written yet",
    "export": "nothing was written; what was there before is as it was",
    "convert": "nothing was written; what was there before is as it was",
    "evaluate": "what was reported before is as it was; started again, it makes its videos anew",
    "download": "files that came whole are kept; started again, it fetches the others",
    "world": "nothing was written; what was there before is as it was",
}


@contextmanager
def clean_errors(context: typer.Context) -> Iterator[None]:
    """Turns our own errors, those of the user's disk and memory and Ctrl-C into one message on stderr and an exit code;
    all others are bugs and keep their traceback.
    """
    try:
        with shown(quiet=context.params.get("quiet", False)):
            yield
    except (Exception, KeyboardInterrupt) as error:
        if context.obj or (told := _told(error)) is None:
            raise
        notes = getattr(error, "__notes__", [])
        can_be_whole = context.info_name in ("generate", "play") and context.params.get("script") is None
        if can_be_whole and (options := getattr(error, "options", None)):
            notes = [*notes, f"the whole command: {command_with(context, options)}"]
        if isinstance(error, KeyboardInterrupt) and not notes:
            notes = [_INTERRUPTED[name]] if (name := context.info_name) in _INTERRUPTED else []
        typer.echo("; ".join([told, *notes]), err=True)
        interrupted = isinstance(error, KeyboardInterrupt)
        code = EXIT_INTERRUPTED if interrupted else EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_ERROR
        raise typer.Exit(code) from None


@contextmanager
def told_once(mesh: Mesh) -> Iterator[None]:
    """Of all ranks the first one says what runs; the others have warnings alone."""
    own = logging.getLogger("longtake")
    before = own.level
    if not mesh.is_main:
        own.setLevel(logging.WARNING)
    try:
        yield
    finally:
        own.setLevel(before)


def _told(error: BaseException) -> str | None:
    """What an error says to who uses a command; None for a bug."""
    if isinstance(error, LongtakeError):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted"
    if is_out_of_memory(error):
        reason = next(iter(str(error).splitlines()), "refused")
        fix = "" if hasattr(error, "__notes__") else "; lower sizes, lengths or batches"
        return f"Not enough memory ({reason}){fix}"
    if isinstance(error, OSError) and (said := refusal(error)) is not None:
        return f"{error.filename or 'The output'}: {said}"
    return None


def command_with(context: typer.Context, options: Mapping[str, Any]) -> str:
    """The command `longtake generate` with what was given to this one, and with these options where it lacks them; that
    of `sampler` wins.
    """
    words, left = ["longtake", "generate"], dict(options)
    for parameter in context.command.params:
        name, value = max(parameter.opts, key=len).lstrip("-"), context.params[str(parameter.name)]
        if value in (None, False, ()) or name in ("sampler", "warm-up"):
            continue
        if parameter.param_type_name == "argument":
            words += value
            left = {key: one for key, one in left.items() if not any(word.startswith(f"{key}=") for word in value)}
        else:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
            left.pop("frames" if name == "seconds" else name, None)
    return shlex.join([*words, *(word for name, value in left.items() for word in (f"--{name}", str(value)))])


def given(context: typer.Context, *names: str) -> dict[str, Any]:
    """Those of the named options that were given on the command line; repeated ones as lists, which some versions of
    typer keep as tuples.
    """
    sources = {name: context.get_parameter_source(name) for name in names}
    said = (name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")
    values = {name: context.params[name] for name in said}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Raises ConfigError where one of the named options was given: the command would not look at it. Args: `why`, in
    which `{option}` is the first of these.
    """
    if wrong := given(context, *names):
        option = next(one for one in context.command.params if one.name in wrong)
        raise ConfigError(why.format(option=option.metavar if option.param_type_name == "argument" else option.opts[0]))


def source_of(
    run: Path | None,
    model: str | None,
    encoders: str | None = None,
    config: Path | None = None,
    changes: dict[str, Any] | None = None,
    *,
    must_stream: bool = True,
) -> Source:
    """Where a command's weights are and by which rules they stream; `must_stream` as in `Source.of_model`.

    Raises: ConfigError for options that do not go together; else as `Source.of_run`, `Source.of_model`.
    """
    if (run is None) == (model is None):
        raise ConfigError("give either --run (a training run) or --model (weights of any origin)")
    if run is not None and (encoders or config) is not None:
        raise ConfigError("--encoders and --config belong to --model; a run brings both along")
    from longtake.config.generation import read_stage
    from longtake.inference.source import Source

    if run is not None:
        return Source.of_run(run, changes)
    assert model is not None
    stage = None if config is None else read_stage(config)
    return Source.of_model(model, encoders, stage, changes, must_stream=must_stream)
