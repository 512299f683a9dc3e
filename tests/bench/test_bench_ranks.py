"""`longtake bench` on the ranks of torchrun: they measure together, and one of them speaks."""

import json

import pytest
from forked_ranks import torchrun


@pytest.mark.whole
def test_a_stream_that_two_ranks_make_together(tmp_path):
    file = tmp_path / "bench.json"
    words = ["--random", "toy", "--size", "32x32", "--blocks", "1", "--warm-up", "--device", "cpu", "--json", file]
    done = torchrun(2, "-m", "longtake", "bench", *words)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(file.read_text())
    assert found["ranks"] == 2 and "each pass by all ranks" in found["shared"] and len(found["rank_peak_gib"]) == 2
    assert done.stdout.count("fps: end_to_end") == 1 and "floor_ms" not in found


@pytest.mark.whole
def test_what_does_not_go_together_is_refused(tmp_path):
    words = ["--random", "toy", "--decode-device", "cpu", "--device", "cpu"]
    done = torchrun(2, "-m", "longtake", "bench", *words)
    assert done.returncode == 2 and "decode_device=cpu is for one process" in done.stderr
