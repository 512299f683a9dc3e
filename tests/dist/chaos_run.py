"""A tiny run on two ranks that is killed again and again at seeded random moments, for `test_chaos_ranks`.

This process imports everything once and forks the ranks (it never runs a backward pass itself), so that a life of the
run costs a second and not six. It does what torchrun does: when a rank dies, the others get SIGTERM and then SIGKILL.

    python tests/dist/chaos_run.py FOLDER --kills 20 --seed 1
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_run
import torch
from torch.utils.tensorboard import SummaryWriter  # noqa: F401 (imported once, before the forks)

from longtake import run_folder
from longtake.parallel.mesh import Mesh, init_mesh
from longtake.errors import CheckpointError
from longtake.config.run import WatchdogConfig

WORLD, SAVE_EVERY, NAN_AT = 2, 2, 4
LOOP = {"on_nonfinite": "skip", "max_skipped": 2}


def train(folder: Path, mesh: Mesh, **options) -> None:
    """The run: one update of each network is skipped, because rank 1 computes a NaN."""
    given = {"save_every": SAVE_EVERY, "nan_at": NAN_AT, "loop": LOOP} | options
    tiny_run.run(folder, mesh, **given)


class Life:
    """Ranks that were started together; what they print goes to `log`."""

    def __init__(self, log: Path, work: Callable[[Mesh], None]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.codes: dict[int, int] = {}
        self.pids = [self._start(rank, port, log, work) for rank in range(WORLD)]

    def _start(self, rank: int, port: int, log: Path, work: Callable[[Mesh], None]) -> int:
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = 0
        try:
            with init_mesh("cpu") as mesh:
                work(mesh)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:  # noqa: BLE001 (this process ends here)
            sys.stderr.write(f"rank {rank} " + traceback.format_exc())
            code = 1
        sys.stderr.flush()
        os._exit(code)

    def reap(self) -> bool:
        """True when every rank has ended."""
        for pid in self.pids:
            if pid not in self.codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[pid] = os.waitstatus_to_exitcode(found[1])
        return len(self.codes) == len(self.pids)

    def send(self, number: int, ranks: list[int]) -> None:
        self.reap()
        for rank in ranks:
            if self.pids[rank] not in self.codes:
                os.kill(self.pids[rank], number)

    def finish(self, seconds: float = 60, grace: float = 3) -> list[int]:
        """The exit codes of all ranks. One that fails ends the others."""
        deadline, failed_at = time.monotonic() + seconds, None
        while not self.reap():
            time.sleep(0.01)
            now = time.monotonic()
            if failed_at is None and any(code != 0 for code in self.codes.values()):
                failed_at = now
            if failed_at is not None and now - failed_at > 0.3:
                self.send(signal.SIGTERM, list(range(WORLD)))
            if now > deadline or (failed_at is not None and now - failed_at > grace):
                self.send(signal.SIGKILL, list(range(WORLD)))
        return [self.codes[pid] for pid in self.pids]


def published(folder: Path) -> list[Path]:
    return run_folder.list_checkpoints(folder / "checkpoints")


def check_published(folder: Path) -> None:
    """Raises CheckpointError when something published is not whole."""
    for path in published(folder):
        run_folder.verify_checkpoint(path)


def damage(folder: Path, how: str) -> str:
    """Breaks the newest checkpoint, if there is one before it to fall back to."""
    if len(published(folder)) < 2:
        return "nothing to damage"
    newest = published(folder)[-1]
    victim = sorted((newest / "state").iterdir())[-1]
    content = victim.read_bytes()
    match how:
        case "truncated":
            victim.write_bytes(content[: len(content) // 2])
        case "flipped":
            victim.write_bytes(content[:-3] + bytes([content[-3] ^ 16]) + content[-2:])
        case "missing":
            victim.unlink()
        case "manifest":
            (newest / "manifest.json").write_text("{")
    try:
        run_folder.verify_checkpoint(newest)
    except CheckpointError:
        return f"{how} {newest.name}"
    raise AssertionError(f"{how} was not noticed")


def torment(folder: Path, steps: int, kills: int, seed: int) -> list[str]:
    """Lives of the run until it is complete; `kills` of them end by a signal. What happened, a line a life."""
    chance, log, story = random.Random(seed), folder.with_suffix(".log"), []
    damages = {kills // 4: "truncated", kills // 2: "flipped", 3 * kills // 4: "missing", kills: "manifest"}
    for number in range(1, kills + 1):
        life = Life(log, lambda mesh: train(folder, mesh, steps=steps))
        early, in_save = number % 5 == 0, number % 3 == 0
        target = 0 if early else len(list_saves(folder)) + chance.randrange(1, 4)
        wait = chance.uniform(0, 0.6) if early else chance.uniform(0, 0.06)
        deadline = time.monotonic() + 60
        while len(list_saves(folder)) < target and not life.reap() and time.monotonic() < deadline:
            time.sleep(0.001)
        while in_save and not leftovers(folder) and not life.reap() and time.monotonic() < deadline:
            pass
        time.sleep(wait)
        ended = life.reap()
        how = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        whom = chance.choice([[0], [1], [0, 1]])
        life.send(how, whom)
        codes = life.finish()
        check_published(folder)
        newest = [path.name for path in published(folder)[-1:]]
        story.append(f"{number}: {how.name} to {whom}, codes {codes}, newest {newest}, left {leftovers(folder)}")
        if ended:
            raise AssertionError(f"the run ended by itself before kill {number}: {codes}; {log.read_text()[-3000:]}")
        if number in damages:
            story.append(damage(folder, damages[number]))
    codes = Life(log, lambda mesh: train(folder, mesh, steps=steps)).finish(300)
    if codes != [0, 0]:
        raise AssertionError(f"the last life ended with {codes}: {log.read_text()[-3000:]}")
    check_published(folder)
    return story


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").glob(".tmp-*")]


def list_saves(folder: Path) -> list[str]:
    """Lines of saves.jsonl: one for each checkpoint that was ever published."""
    file = folder / "saves.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def starved(folder: Path, mesh: Mesh) -> None:
    """From step 4 on, rank 1 may write no file of more than a kilobyte: a full disk that no check can foresee."""
    if mesh.rank == 1:
        from longtake.checkpoint import save as checkpoint

        write = checkpoint._write_state

        def limited(snapshot, *rest):
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            if snapshot.step > 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            try:
                return write(snapshot, *rest)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)  # what it prints goes to a file, too

        checkpoint._write_state = limited
    train(folder, mesh, steps=12)


def unchecked(folder: Path, mesh: Mesh) -> None:
    """The disk is full when the save has begun: the check before it saw room."""
    from longtake.checkpoint import async_save as saver

    saver.check_space = lambda *_: None
    train(folder, mesh, steps=12)


def hanging(folder: Path, mesh: Mesh, where: str) -> None:
    """Rank 1 stands still in iteration 5, in its data or in the middle of its work."""
    rows, loss = tiny_run.Rows.__next__, tiny_run.TwoPlayers.loss

    def read(self):
        if mesh.rank == 1 and where == "data" and self.position == 5 * tiny_run.BATCH:
            time.sleep(600)
        return rows(self)

    def compute(self, turn, batch, step):
        if mesh.rank == 1 and where == "critic" and (turn, step) == ("critic", 5):
            time.sleep(600)
        return loss(self, turn, batch, step)

    tiny_run.Rows.__next__, tiny_run.TwoPlayers.loss = read, compute
    logging.basicConfig(format=f"rank {mesh.rank} says %(message)s")
    train(folder, mesh, steps=12, loop=LOOP | {"watchdog": WatchdogConfig(seconds=1.5, slow_seconds=30)})


SCENARIOS: dict[str, Callable[[Path, Mesh], None]] = {
    "plain": lambda folder, mesh: train(folder, mesh, steps=12),
    "nan": lambda folder, mesh: train(folder, mesh, steps=12, loop={}),
    "starved": starved,
    "unchecked": unchecked,
    "data": lambda folder, mesh: hanging(folder, mesh, "data"),
    "critic": lambda folder, mesh: hanging(folder, mesh, "critic"),
}


def play(folder: Path, names: list[str]) -> list[dict]:
    """What came of scenarios in one folder."""
    seen = []
    for number, name in enumerate(names):
        log = folder.parent / f"{folder.name}-{number}-{name}.log"
        codes = Life(log, lambda mesh, name=name: SCENARIOS[name](folder, mesh)).finish()
        check_published(folder)
        left = [path.name for path in (folder / "checkpoints").iterdir()]
        seen.append({"name": name, "codes": codes, "log": log.read_text(), "checkpoints": sorted(left)})
    return seen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scenarios", nargs="+", help="with commas: in this order, all in the same folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    if args.scenarios:
        rows = {names: args.folder / f"run{number}" for number, names in enumerate(args.scenarios)}
        print(json.dumps({names: play(folder, names.split(",")) for names, folder in rows.items()}))
        return
    steps = 10 * args.kills + 10  # more than all lives can make
    codes = Life(args.folder / "whole.log", lambda mesh: train(args.folder / "whole", mesh, steps=steps)).finish(300)
    assert codes == [0, 0], (args.folder / "whole.log").read_text()
    whole = time.monotonic() - start
    story = torment(args.folder / "run", steps, args.kills, args.seed)
    print(json.dumps({"whole_seconds": whole, "seconds": time.monotonic() - start, "story": story}, indent=1))


if __name__ == "__main__":
    main()
