"""The watchdog: who is behind, what counts as slow, and that it ends what hangs and nothing else."""

import threading
import time

import pytest
import tiny_run
from fake_ranks import on_ranks

from longtake.config.run import WatchdogConfig
from longtake.errors import ConfigError
from longtake.parallel.mesh import Mesh
from longtake.train.loop import Hooks
from longtake.train.metrics import PhaseTimer
from longtake.train.watchdog import Seen, Watchdog, report


def seen(rank, phase, progress, *, step=12, seconds=600.0, at=1000.0, waits=False):
    return Seen(rank, step, phase, seconds, "fetch", progress, f"file.py:{rank} in f", waits, at)


def test_the_report_names_the_rank_that_is_behind():
    ranks = [seen(rank, "step", 51) for rank in (0, 1, 2)] + [seen(3, "rollout", 50)]
    text = report(ranks, silent=[], interval=10, now=1001)
    assert text == (
        "rank 3 has been in phase 'rollout' of step 12 for 600 s, after 'fetch' (at file.py:3 in f); "
        "ranks 0,1,2 wait in 'step' of step 12 (at file.py:0 in f)"
    )


def test_the_report_names_who_is_silent_first_and_tells_equals_by_their_lines():
    ranks = [seen(0, "rollout", 50), seen(1, "rollout", 50), seen(2, "fetch", 99, at=300.0)]
    text = report(ranks, silent=[3], interval=10, now=1001).split("; ")
    assert text[0] == "rank 3 was never heard of"
    assert text[1].startswith("rank 2 has not been heard of for 701 s, last in phase 'fetch' of step 12")
    assert text[2].endswith("(at file.py:0 in f)") and text[3].endswith("(at file.py:1 in f)")


def test_of_equals_the_one_outside_a_collective_is_behind():
    ranks = [seen(rank, "rollout", 50, waits=rank != 1) for rank in range(3)]
    text = report(ranks, silent=[], interval=10, now=1001).split("; ")
    assert text[0].startswith("rank 1 has been in phase 'rollout'")
    assert text[1] == "ranks 0,2 wait in 'rollout' of step 12 (at file.py:0 in f)"


class Store:
    """What a TCPStore does, for threads."""

    def __init__(self):
        self.values, self.lock = {}, threading.Lock()

    def set(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)

    def add(self, key, amount):
        with self.lock:
            self.values[key] = self.values.get(key, 0) + amount
            return self.values[key]


def hang(mesh, store, blocked):
    """Both ranks fetch; then rank 1 sleeps in its roll-out while rank 0 waits for it a phase later."""
    phases, ended = PhaseTimer(), threading.Event()
    config = WatchdogConfig(seconds=0.3, slow_seconds=0.3)
    watchdog = Watchdog(mesh, config, phases, lambda: 12, end=ended.set)
    watchdog.mesh = type("WithStore", (), {"rank": mesh.rank, "world_size": 2, "store": lambda self, name: store})()
    with watchdog:
        with phases("fetch"):
            pass
        with phases("rollout"):
            if mesh.rank == 1:
                assert ended.wait(10)
                return
        with phases("step"):
            assert ended.wait(10)


def test_a_hang_of_one_rank_is_reported_once_with_its_name(caplog):
    store = Store()
    on_ranks(lambda mesh: hang(mesh, store, None))
    reports = [record.getMessage() for record in caplog.records if "NO PROGRESS" in record.getMessage()]
    assert len(reports) == 1
    behind, waits = reports[0].split("(watchdog): ")[1].split(". The run ends")[0].split("; ")
    assert behind.startswith("rank 1 has been in phase 'rollout' of step 12") and "after 'fetch'" in behind
    assert waits.startswith("rank 0 waits in 'step' of step 12")
    assert "(at threading.py" in behind and "watchdog.seconds=0.3" in reports[0]


def watch(seconds, slow, work):
    """True when `work(phases)` was ended."""
    phases, ended = PhaseTimer(), threading.Event()
    config = WatchdogConfig(seconds=seconds, slow_seconds=slow)
    with Watchdog(Mesh(), config, phases, lambda: 0, end=ended.set):
        work(phases)
        return ended.is_set()


def stay(phases, *names, seconds=0.45):
    with phases(names[0]):
        stay(phases, *names[1:], seconds=seconds) if names[1:] else time.sleep(seconds)


@pytest.mark.whole
def test_what_is_rightly_slow_is_no_hang():
    """First times, encoding, evaluation and saving have the longer limit; the second time of a phase has not."""
    assert not watch(0.2, 60, lambda phases: stay(phases, "generator", "rollout"))
    for name in ("encode", "evaluate", "sample", "checkpoint", "resume"):
        assert not watch(0.2, 60, lambda phases, name=name: (stay(phases, name, seconds=0), stay(phases, name)))
    assert watch(0.2, 60, lambda phases: (stay(phases, "rollout", seconds=0), stay(phases, "rollout")))
    assert watch(0.2, 60, lambda phases: time.sleep(0.45))
    # Inside an evaluation the limit is that of the evaluation, whatever it does there.
    again = ("evaluate", "rollout")
    assert not watch(0.2, 60, lambda phases: (stay(phases, "rollout", seconds=0), stay(phases, *again)))
    assert watch(0.2, 0.3, lambda phases: stay(phases, "generator"))


def test_progress_and_nought_are_no_hang():
    assert not watch(0.3, 0.3, lambda phases: [stay(phases, "step", seconds=0.1) for _ in range(6)])
    assert not watch(0, 0, lambda phases: stay(phases, "step"))


@pytest.mark.whole
def test_a_whole_run_under_a_watchdog_is_the_same_run(tmp_path):
    def slow(step):
        time.sleep(0.4)
        return {}

    loop = {"watchdog": WatchdogConfig(seconds=0.2, slow_seconds=30)}
    one = tiny_run.run(tmp_path / "watched", Mesh(), hooks=Hooks(evaluate=slow), loop=loop)
    two = tiny_run.run(tmp_path / "plain", Mesh())
    assert all(value.equal(two.tensors()[name]) for name, value in one.tensors().items())
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_the_slow_limit_is_the_longer_one():
    with pytest.raises(ConfigError, match="slow_seconds=5 must be at least seconds=9"):
        WatchdogConfig(seconds=9.0, slow_seconds=5.0)
