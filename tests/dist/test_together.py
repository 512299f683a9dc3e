"""A rank that fails inside a call that all ranks make together: agreed where all came out of it, else the run ends."""

import together_run
from forked_ranks import torchrun


def test_what_all_came_out_of_is_agreed_and_what_one_waits_in_ends_the_run_at_once():
    """The last call would wait ten minutes for the rank that is gone."""
    done = torchrun(2, together_run.__file__)
    assert done.returncode != 0, done.stderr[-3000:]
    said = sorted(done.stdout.splitlines())
    for rank, failed in enumerate(("TrainingError rank 1 failed with OutOfMemoryError: after", "OutOfMemoryError after")):
        mine = [line for line in said if line.startswith(f"rank {rank}: ")]
        assert f"rank {rank}: [0, 1]; ConfigError: both" in mine and f"rank {rank}: [7, 7]" in mine
        assert any(line.startswith(f"rank {rank}: {failed}") for line in mine), mine
    (last,) = (line for line in said if "s: rank" in line)
    assert last.startswith("rank 1: after 2 s: rank 1 failed with OutOfMemoryError: between; rank 0 waited for it inside")
