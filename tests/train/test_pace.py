"""What a job says about its stages."""

import logging

from longtake.config.job import load_config
from longtake.config.validation import ValidationConfig
from longtake.train import pace as module
from longtake.train.pace import JobPace, in_words


def test_a_job_says_where_it_is_and_what_is_left(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "longtake")
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stages = load_config("longtake/recipes/toy/i2v.yaml").stages
    steps = {name: stage.max_steps for name, stage in stages.items()}
    assert list(steps) == ["causal", "distill"]
    pace = JobPace({name: (steps[name], "nothing") for name in steps})
    pace.begin("causal")
    now[0] = 60.0
    pace.end("causal", steps["causal"] // 2)  # resumed: half of it had been made
    pace.begin("distill")
    lines = [record.getMessage() for record in caplog.records]
    assert (
        lines[0] == f"Stage 1 of 2, causal: {steps['causal']} iterations, validates nothing"
        and lines[1] == "Stage causal took 1 min 0 s"
    )
    left = module.duration(steps["distill"] * 120 / steps["causal"])
    assert lines[2].startswith("Stage 2 of 2, distill: ") and lines[2].endswith(
        f"; about {left} left in all, at the pace of the stages before"
    )


def test_what_a_stage_validates():
    rows, worlds, none = (ValidationConfig(num_rows=r, num_worlds=w) for r, w in ((4, 8), (0, 8), (0, 0)))
    assert in_words(worlds, 50) == "8 held-out worlds every 50" and in_words(rows, 9) == "4 rows of data every 9"
    assert in_words(rows, 0) == in_words(none, 50) == "nothing"
