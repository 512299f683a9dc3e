"""What a job says about its stages."""

import logging

import pytest

from longtake.config.job import load_config
from longtake.config.validation import ValidationConfig
from longtake.parallel.mesh import Mesh
from longtake.train import pace as module
from longtake.train.networks import Builder
from longtake.train.pace import JobPace, StagePlan, in_words
from longtake.train.planned import planned_operations


@pytest.fixture
def clock(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "longtake")
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_the_first_stage_says_what_is_left_of_all_and_how_it_is_counted(clock, caplog):
    pace = JobPace({"causal": StagePlan(100, "nothing", 2e9), "distill": StagePlan(50, "nothing", 5e9)})
    pace.begin("causal")
    clock(60)  # it compiles
    for step in range(1, 8):
        clock(2)
        pace.update(step)
    assert lines(caplog) == [
        "Stage 1 of 2, causal: 100 iterations, validates nothing",
        "causal: 6 of 100 iterations, 2 s each with all that stood between; about 7 min 18 s left in all, at this pace, "
        "counting an iteration of it as 1 and one of distill as 2.5, as their model calls ask",
    ]
    assert 2 * 94 + 2 * 2.5 * 50 == 438
    for step in range(8, 101):
        clock(2)
        pace.update(step)
    assert [line.split(" of ")[0] for line in lines(caplog)[2:]] == ["causal: 16", "causal: 46"]  # 30 and 90 s
    pace.end("causal", 100)
    pace.begin("distill")
    assert lines(caplog)[-2:] == [
        "Stage causal took 4 min 20 s",
        "Stage 2 of 2, distill: 50 iterations, validates nothing; about 5 min 25 s left in all, at the pace of the stages "
        "before",
    ]
    assert 260 / 200 * 50 * 5 == 325
    for step in range(1, 5):
        clock(7)
        pace.update(step)
    assert lines(caplog)[-1] == (
        "distill: 3 of 50 iterations, 7 s each with all that stood between; about 5 min 29 s left in all, at this pace"
    )


def test_a_resumed_stage_counts_what_it_made_and_unknown_work_is_said(clock, caplog):
    pace = JobPace({"a": StagePlan(10, "nothing"), "b": StagePlan(10, "nothing", 1e9)})
    pace.begin("a")
    clock(60)
    pace.end("a", 5)  # half of it had been made
    pace.begin("b")
    pace.update(5)
    clock(10)
    pace.update(6)
    assert "about 2 min 0 s left in all, at the pace of the stages before" in lines(caplog)[2]
    assert "b: 6 of 10 iterations, 10 s each with all that stood between; about 40 s left in all" in lines(caplog)[3]
    pace.begin("a")
    pace.update(0)
    clock(10)
    pace.update(1)
    assert lines(caplog)[-1].endswith(
        "3 min 10 s left in all, at this pace, as if iterations of all stages took as long"
    )


def planned(config):
    return planned_operations(Builder(config, Mesh()))


def test_what_a_stage_asks_for_is_known_before_its_weights_are_there(tmp_path):
    causal, distill = load_config("toy/i2v", [f"logdir={tmp_path}"]).stages.values()
    asked = planned(causal), planned(distill)
    assert all(asked) and not list(tmp_path.iterdir())
    twice = causal.model_copy(update={"batch_size": 2 * causal.batch_size})
    assert planned(twice) == pytest.approx(2 * asked[0])
    assert planned(load_config("toy/long", [f"logdir={tmp_path}"]))  # which decodes


def test_what_a_stage_validates():
    rows, worlds, none = (ValidationConfig(num_rows=r, num_worlds=w) for r, w in ((4, 8), (0, 8), (0, 0)))
    assert in_words(worlds, 50) == "8 held-out worlds every 50" and in_words(rows, 9) == "4 rows of data every 9"
    assert in_words(rows, 0) == in_words(none, 50) == "nothing"
