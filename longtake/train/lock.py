"""One run a folder, of all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from longtake.lock import locked
from longtake.parallel.mesh import Mesh


@contextmanager
def only_run(folder: Path, mesh: Mesh, fix: str) -> Iterator[None]:
    """As `locked`, by all ranks, of which the first holds the lock. Raises: ConfigError on each of them."""
    with ExitStack() as stack:
        mesh.on_main(lambda: stack.enter_context(locked(folder, fix)))
        yield
