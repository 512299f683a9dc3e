"""A student of two networks on disk: one denoises, and another writes the context that it reads (SGF+).

In one file, the second one's tensors have names that begin with `memory_`; what is not there is shared. In a checkpoint
of low-rank updates they lie in a folder beside the first one's. Whoever asks for one network alone is refused.
Source of the names: Zihan-Su/Self_Gradient_Forcing_Plus, utils/checkpoint.py. Must know no model.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from longtake.errors import ConfigError
from longtake.run_folder import WRITER
from longtake.weights.lora import is_adapter
from longtake.weights.read import CheckpointReader

# `alone`, of a source that is no more than that; `reader`, what denoises, whatever else there is; `writer`
Part = Literal["alone", "reader", "writer"]

PREFIX = "memory_"
_MEMORY = re.compile(rf"(^|\.){PREFIX}")


def holds_writer(published: CheckpointReader) -> bool:
    """Whether a second network's tensors are among these."""
    return any(_MEMORY.search(name) for name in published.tensors)


def reader_of(published: CheckpointReader) -> CheckpointReader:
    """The tensors of the network that denoises."""
    tensors = {name: stored for name, stored in published.tensors.items() if not _MEMORY.search(name)}
    return replace(published, tensors=tensors)


def writer_of(published: CheckpointReader) -> CheckpointReader:
    """Those of the network that writes the context: its own beside the others', and theirs where there is none."""
    own = {_MEMORY.sub(r"\1", name): stored for name, stored in published.tensors.items() if _MEMORY.search(name)}
    return replace(published, tensors=reader_of(published).tensors | own)


def part_of(published: CheckpointReader, part: Part) -> CheckpointReader:
    """The tensors of one of them. Raises: ConfigError where another network than the one alone is there."""
    if part == "writer":
        return writer_of(published)
    if part == "alone" and holds_writer(published):
        raise are_two(published.path)
    return reader_of(published)


def writers_own(reader: nn.Module, writer: nn.Module) -> dict[str, Tensor]:
    """The tensors of the writer that are not those of what reads, under the names that they have beside these."""
    theirs = reader.state_dict()
    return {f"{PREFIX}{name}": tensor for name, tensor in writer.state_dict().items() if not tensor.equal(theirs[name])}


def writer_updates(folder: Path) -> Path | None:
    """The low-rank updates that write the context of those in `folder`, where a run trained such."""
    beside = folder.with_name(folder.name.replace("generator", WRITER, 1))
    return beside if beside != folder and is_adapter(folder) and is_adapter(beside) else None


def updates_of(folder: Path, part: Part) -> Path:
    """The low-rank updates of one of them. Raises: ConfigError as `part_of`."""
    beside = writer_updates(folder)
    if part == "alone" and beside is not None:
        raise are_two(folder)
    return beside if part == "writer" and beside is not None else folder


def are_two(source: object) -> ConfigError:
    """What is said to who asks for one network."""
    return ConfigError(
        f"{source} is two networks, of which one makes the context of the other, and this takes one; both together can "
        "be played (longtake generate, play, serve) and evaluated, and a stage with objective.context_writer=own goes "
        "on from the run of one that had it"
    )
