"""The benchmark of the live server, rehearsed on tiny random networks: its numbers are what they say."""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
from tiny_sessions import make_generator

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def live():
    sys.path.insert(0, str(ROOT))
    try:
        return import_module("benchmarks.live")
    finally:
        sys.path.remove(str(ROOT))


@pytest.mark.whole
@pytest.mark.parametrize("unpaced", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_short_run(live, tmp_path, monkeypatch, unpaced):
    from contextlib import contextmanager

    from live_server import serving

    @contextmanager
    def server(arguments, folder):
        with serving(make_generator(), folder, max_sessions=2) as address:
            yield address, os.getpid()

    monkeypatch.setattr(live, "server", server)
    monkeypatch.setattr(live, "SETTLING_SECONDS", 0.5)
    file = tmp_path / "live.json"
    flags = ["--unpaced"] if unpaced else []
    assert live.main(["-o", str(file), "--seconds", "4", "--every", "1.5", "--viewers", "2", *flags]) == 0
    found = json.loads(file.read_text())
    assert found["viewers"] == 2 and len(found["first_frame_s"]) == 2 and max(found["first_frame_s"]) < 20
    assert found["prompts"] >= 1 and 0 < found["prompt_to_pixel_p50_s"] <= found["prompt_to_pixel_p95_s"]
    low, high = (1, 10_000) if unpaced else (4, 32)
    assert all(low < rate < high for rate in found["frames_per_second"])
    assert found["memory_first_third_mb"] > 100 and found["model"]["fps"] == 16
