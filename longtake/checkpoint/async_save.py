"""When and how a run's checkpoints are written: beside the training, or while it waits.

`async`: the loop waits until the state is copied to host memory (`staging.py`); a thread writes the copy, makes the
exports and publishes, over a process group of its own. One save is in flight at a time: the next one waits for it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from longtake import run_folder
from longtake.checkpoint.save import RunInfo, Snapshot, check_space, save_checkpoint, written_here
from longtake.checkpoint.staging import Staging, fits_in_host_memory
from longtake.config.run import CheckpointConfig
from longtake.parallel.mesh import Mesh
from longtake.train.state import TrainState

SAVES = "saves.jsonl"  # in the stage folder: what each save took
EXPORTED = ("generator",)  # networks whose weights are also written whole
logger = logging.getLogger(__name__)


class Saver:
    """Saves the checkpoints of one stage; every method but `failed` is called by all ranks together.

    Args: `keep`, how many checkpoints stay; `info` of every manifest.
    """

    def __init__(
        self,
        state: TrainState,
        folder: Path,
        config: CheckpointConfig,
        *,
        keep: int,
        mesh: Mesh,
        info: RunInfo,
    ) -> None:
        self.folder, self.config, self.keep, self.mesh = folder, config, keep, mesh
        self._state, self._info = state, info
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        # Refused now rather than after hours.
        check_space(Snapshot.of(state, EXPORTED), folder, mesh)
        self._staging, self._beside = None, mesh
        if config.mode == "async":
            tensors = written_here(state.tensors(), mesh)
            if fits_in_host_memory(tensors, mesh):
                self._staging, self._beside = Staging(tensors), mesh.beside()
            elif mesh.is_main:
                logger.warning("Saving makes the training wait: host memory is too small for checkpoint.mode=async")

    @property
    def failed(self) -> bool:
        """True when a save in the background failed on this rank; `wait` raises the error."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def save(self, *, last: bool = False, then: Callable[[Path], None] | None = None) -> None:
        """Saves the state; returns when the training may change it again. `last`: no further one is planned.

        Args: `then` is called on rank 0 with the published checkpoint, which holds whole weights for it.

        Raises: CheckpointError on every rank, also for the save before; older checkpoints stay.
        """
        start = time.perf_counter()
        self.wait()  # the one before: its copy is in the memory that this one's will overwrite
        waited = time.perf_counter() - start
        networks = EXPORTED if last or then is not None or self.config.export == "every" else ()
        snapshot = Snapshot.of(self._state, networks)
        check_space(snapshot, self.folder, self.mesh)
        if self._staging is not None:
            snapshot = replace(snapshot, values=self._staging.copy(written_here(snapshot.tensors, self.mesh)))
        times = {"wait": waited, "stage": time.perf_counter() - start - waited}
        if self._staging is None:
            self._write(snapshot, times, then)
        else:
            self._writing = self._thread.submit(self._write, snapshot, times, then)

    def wait(self) -> None:
        """Returns when everything is published. Raises: the error of a save in the background, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self, *, failing: bool = False) -> None:
        """Waits for the last save. After an error of the training, an error of the save is only logged."""
        try:
            self.wait()
        except Exception as error:
            if not failing:
                raise
            logger.error("The checkpoint that was being written is lost (older ones are intact): %s", error)
        self._thread.shutdown()
        if self._beside is not self.mesh and not failing:
            self._beside.leave_group()

    def _write(self, snapshot: Snapshot, times: dict[str, float], then: Callable[[Path], None] | None) -> None:
        start, mesh = time.perf_counter(), self._beside
        path = save_checkpoint(snapshot, self.folder, mesh=mesh, info=self._info, keep=self.keep)
        times["write"] = time.perf_counter() - start
        mesh.on_main(lambda: self._log(snapshot.step, times))
        if then is not None:
            mesh.on_main(lambda: then(path))

    def _log(self, step: int, times: Mapping[str, float]) -> None:
        files = run_folder.read_manifest(self.folder / run_folder.checkpoint_name(step))["files"]
        line = {
            "step": step,
            "mode": "sync" if self._staging is None else "async",
            "size_bytes": sum(record["size_bytes"] for record in files.values()),
            **{f"seconds/{name}": value for name, value in times.items()},
        }
        with (self.folder.parent / SAVES).open("a") as file:
            file.write(json.dumps(line) + "\n")
