"""Loads library models from local folders and refuses every key that does not fit.

The libraries' own loaders fill missing weights with random numbers and only warn. Must know no model in particular.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longtake.errors import CheckpointError
from longtake.progress import track
from longtake.weights.file_kind import is_pickled
from longtake.weights.locate import files_in
from longtake.weights.tensor_files import check_finite


def check_folder(folder: str | Path, what: str) -> Path:
    """`folder` as a path. Raises: CheckpointError unless it holds `config.json` and safetensors weights."""
    path = Path(folder)
    if not path.is_dir():
        fix = "give a folder with config.json and *.safetensors"
        raise CheckpointError(f"the {what} folder {path} does not exist; {fix}")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path / 'config.json'} is missing; the {what} folder needs it beside its weights")
    if not files_in(path):
        raise CheckpointError(f"{path} holds no *.safetensors file; the {what} folder needs its weights in this format")
    return path


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Remarks that these libraries log here, and that a user can do nothing about, are not shown; their errors are."""
    loggers = [logging.getLogger(name) for name in libraries]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def reading(failed: str) -> Iterator[None]:
    """Whatever another library raises about its own files becomes a CheckpointError that begins with `failed`."""
    try:
        yield
    except BaseException as error:  # a wrong value may raise anything; a panic of Rust is no Exception
        theirs = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if isinstance(error, MemoryError) or not theirs:
            raise
        raise CheckpointError(f"{failed}: {' '.join(str(error).split())[:400]}") from error


def load_strictly(model_class: Any, folder: Path, *, ignore: tuple[str, ...] = (), **options: Any) -> Any:
    """`model_class.from_pretrained(folder)` on the CPU, in eval mode.

    Args: `ignore`, prefixes of surplus keys that belong to parts which are not wanted (a text tower, a head).
    Raises: CheckpointError that lists missing, surplus and reshaped keys, or says that the files cannot be read.
    """
    from transformers.utils import logging as transformers_logging

    for file in files_in(Path(folder)):
        is_pickled(file)  # says what it is, where it is no file of weights
    transformers_logging.disable_progress_bar()  # one bar a small model and rank would bury the training's own
    # What matters, the keys, is said below.
    loading = _told(f"loading {model_class.__name__}")
    with quiet("diffusers", "transformers"), loading, reading(f"{folder} cannot be loaded as {model_class.__name__}"):
        model, info = model_class.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, use_safetensors=True, **options
        )
    surplus = [key for key in info["unexpected_keys"] if not key.startswith(ignore)]
    problems = {"missing": info["missing_keys"], "surplus": surplus, "reshaped": map(str, info["mismatched_keys"])}
    refuse({group: sorted(keys) for group, keys in problems.items()}, folder, model_class.__name__)
    for name, tensor in model.state_dict().items():
        check_finite(tensor, f"{name} of {folder}")
    return model.eval()


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What transformers says inside of the tensors that it has loaded is said as we do."""
    from transformers.utils import logging as transformers_logging

    def instead(factory: Any, words: Any, named: Any) -> Any:
        known = bool(words) and isinstance(words[0], Collection)
        return track(words[0], what, "tensors") if known else factory(*words, **named)

    set_hook = getattr(transformers_logging, "set_tqdm_hook", lambda _: None)  # the first versions of 5 have none
    before = set_hook(instead)
    try:
        yield
    finally:
        set_hook(before)


def refuse(problems: Mapping[str, list[str]], source: Path, model: str) -> None:
    """Raises CheckpointError that lists groups of keys of `source`, unless there are none."""
    found = [f"{len(keys)} {name}: {', '.join(keys[:20])}" for name, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"the weights in {source} do not fit {model}; keys {'; '.join(found)}")
