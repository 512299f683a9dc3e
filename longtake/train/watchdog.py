"""Ends a run that hangs, and says which rank hangs where.

A thread on each rank looks at the phase that the training is in. Ranks share what they see through the key-value store
of the run, so that the report of a hang names the rank that is behind and not those that wait for it; files in the run
folder would not do, for a disk that hangs is one of the reasons. A rank whose interpreter is stuck in foreign code
cannot report: the others say that it is silent.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from longtake.config.run import WatchdogConfig
from longtake.parallel.mesh import Mesh
from longtake.train.metrics import PhaseTimer

logger = logging.getLogger(__name__)

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_COLLECTIVES = os.path.dirname(dist.__file__)
EXIT_CODE = 124  # that of `timeout`
# Rightly slow at any time, not only at first
SLOW_PHASES = frozenset({"resume", "encode", "evaluate", "sample", "checkpoint"})


@dataclass(frozen=True)
class Seen:
    """What a rank was doing at the moment `at` (seconds since the epoch).

    Fields: `phase` and for how many `seconds` nothing happened in it; `completed`, the phase before; `progress`, how
    many phases began or ended since the start: the rank with the least is behind; `where`, the line that it is at;
    `waits`, whether that line is inside `torch.distributed`: of equals, the rank that is not is behind.
    """

    rank: int
    step: int
    phase: str
    seconds: float
    completed: str
    progress: int
    where: str
    waits: bool
    at: float


class Watchdog:
    """Watches this rank; a context manager, which every rank enters.

    Args: `phases` of the training, `step` that it is at; `end`, what happens after the report.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: WatchdogConfig,
        phases: PhaseTimer,
        step: Callable[[], int],
        end: Callable[[], None] | None = None,
    ) -> None:
        self.mesh, self.config, self.phases, self.step = mesh, config, phases, step
        self._end = end or _end_process
        self._main = threading.current_thread().ident
        self._stopped = threading.Event()
        self.interval = min(10.0, config.seconds / 5)
        self._store: Any = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.config.seconds > 0:
            self._store = self.mesh.store("watchdog")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(1)  # it may sit in the store of a run that is ending

    @property
    def limit(self) -> float:
        """Seconds that nothing may happen for, now."""
        now_open = self.phases.open  # read once: the training changes it meanwhile
        # The first time of a phase may compile and allocate; inside a slow phase the limit is that phase's.
        slow = not SLOW_PHASES.isdisjoint(now_open) or (now_open and now_open[-1] not in self.phases.known)
        return self.config.slow_seconds if slow else self.config.seconds

    @property
    def quiet(self) -> float:
        """Seconds for which nothing happened."""
        return time.monotonic() - self.phases.changed

    def seen(self) -> Seen:
        """What this rank is doing."""
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame) if frame is not None else []
        return Seen(
            rank=self.mesh.rank,
            step=self.step(),
            phase=("between phases", *self.phases.open)[-1],
            seconds=self.quiet,
            completed=self.phases.last or "nothing yet",
            progress=self.phases.changes,
            where=_line(stack),
            waits=bool(stack) and stack[-1].filename.startswith(_COLLECTIVES),
            at=time.time(),
        )

    def _watch(self) -> None:
        while not self._stopped.wait(self.interval):
            before = self.phases.changes
            self._publish()
            if self.quiet <= self.limit:
                continue
            # The others have said what they do by then, and this one may have gone on.
            if self._stopped.wait(2 * self.interval) or self.phases.changes != before:
                continue
            self._publish()
            self._report()
            self._end()
            return

    def _publish(self) -> None:
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # a store that is gone or hangs: each rank then speaks for itself
                self._store.set(str(self.mesh.rank), json.dumps(asdict(self.seen())))

    def _report(self) -> None:
        seen, silent, limit = [self.seen()], set[int](), self.limit
        try:
            if self._store is not None:
                if self._store.add("reports", 1) > 1:
                    time.sleep(3 * self.interval)  # another rank has the word: the first that ends takes all with it
                    return
                keys = [str(rank) for rank in range(self.mesh.world_size) if self._store.check([str(rank)])]
                seen = [Seen(**json.loads(self._store.get(key))) for key in keys]
                silent = set(range(self.mesh.world_size)) - {one.rank for one in seen}
        except RuntimeError:
            logger.error(
                "The store of the run is gone, another rank may have ended it; what follows is this rank alone"
            )
        logger.critical(
            "NO PROGRESS for %g s (watchdog): %s. The run ends; started again, it goes on from its newest "
            "checkpoint. If this was no hang, raise watchdog.seconds=%g or watchdog.slow_seconds=%g",
            limit,
            report(seen, silent=sorted(silent), interval=self.interval, now=time.time()),
            self.config.seconds,
            self.config.slow_seconds,
        )


def _line(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line of Longtake, and the line that it waits at."""
    ours = [entry for entry in stack if entry.filename.startswith(_PACKAGE)] or stack
    lines = [f"{os.path.basename(entry.filename)}:{entry.lineno}" for entry in (*ours[-1:], *stack[-1:])]
    return f"{' > '.join(dict.fromkeys(lines))} in {stack[-1].name}" if stack else "nowhere"


def report(seen: list[Seen], *, silent: list[int], interval: float, now: float) -> str:
    """Who is behind, who waits for it, and where each of them is; ranks in `silent` never said anything."""
    lost = [one for one in seen if now - one.at > 4 * interval]
    heard = [one for one in seen if one not in lost]
    parts = [f"rank {rank} was never heard of" for rank in silent]
    parts += [
        f"rank {one.rank} has not been heard of for {now - one.at:.0f} s, last in phase '{one.phase}' of step "
        f"{one.step} (at {one.where})"
        for one in lost
    ]
    least = min((one.progress for one in heard), default=0)
    behind = [one for one in heard if one.progress == least]
    if not all(one.waits for one in behind):
        behind = [one for one in behind if not one.waits]
    ahead = [one for one in heard if one not in behind]
    parts += [
        f"rank {one.rank} has been in phase '{one.phase}' of step {one.step} for {one.seconds:.0f} s, after "
        f"'{one.completed}' (at {one.where})"
        for one in behind
    ]
    for phase, step in sorted({(one.phase, one.step) for one in ahead}):
        group = [one for one in ahead if (one.phase, one.step) == (phase, step)]
        ranks = ",".join(str(one.rank) for one in group)
        who = f"rank {ranks} waits" if len(group) == 1 else f"ranks {ranks} wait"
        parts.append(f"{who} in '{phase}' of step {step} (at {group[0].where})")
    return "; ".join(parts)


def _end_process() -> None:
    """Ends this process at once: the thread of the training would not listen."""
    faulthandler.dump_traceback(all_threads=True)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(EXIT_CODE)
