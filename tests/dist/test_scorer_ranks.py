"""Scorers of an evaluation over two ranks, one of which loses its own."""

import forked_ranks
import pytest
import scorers_run
from forked_ranks import torchrun
from tiny_stage import save_student, stage_config


@pytest.mark.whole
def test_scorers_that_die_on_one_rank_end_both_with_one_message(workshop, tmp_path, monkeypatch):
    """The other one would wait for their scores until the exchange times out."""
    monkeypatch.setattr(forked_ranks, "GRACE_SECONDS", 60.0)  # it ends its own scorers first, on a busy machine for long
    save_student(stage_config(workshop, tmp_path / "log", "causal"), seed=5)
    words = ["--run", tmp_path / "log", "-o", tmp_path / "out", "--device", "cpu", "--num-worlds", "4", "--no-ablations"]
    done = torchrun(2, scorers_run.__file__, "evaluate", *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("LongtakeError: a process for the scores of videos was ended") == 2
    assert not (tmp_path / "out").exists()
