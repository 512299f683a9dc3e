"""The endless benchmark, rehearsed: its numbers are what they say, and its bars can be missed."""

import colorsys
import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from tiny_sessions import make_generator

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def endless():
    sys.path.insert(0, str(ROOT))
    try:
        return import_module("benchmarks.endless")
    finally:
        sys.path.remove(str(ROOT))


@pytest.mark.whole
def test_a_short_stream_leaves_numbers_and_curves(endless, tmp_path, monkeypatch, capsys):
    generator = make_generator()
    monkeypatch.setattr(endless.Generator, "from_model", lambda *_, **__: generator)
    code = endless.main(["-o", str(tmp_path), "--frames", "61", "--switch-every", "7"])
    result = json.loads((tmp_path / "endless.json").read_text())
    rows, bars = result["per_block"], result["bars"]
    assert result["latent_frames"] == 61 and result["pixel_frames"] == 241 and result["blocks"] == 30
    assert all(len(values) == 30 for values in rows.values()) and all(rows["finite"])
    assert bars["memory"]["met"] and bars["memory"]["early_bytes"] > 1e5 and bars["finite"]["met"]
    assert code == (0 if bars["time in turns"]["met"] else 1) and "met" not in bars["time"]
    assert all(len(times) == 10 and min(times) > 0 for times in result["in_turns"].values())
    assert (tmp_path / "endless.png").read_bytes().startswith(b"\x89PNG")
    assert "finite: met: blocks 30" in capsys.readouterr().out


def test_colour_measures(endless):
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    pixels = frames.reshape(-1, 3) / 255
    assert endless.saturation(frames) == pytest.approx(np.mean([colorsys.rgb_to_hsv(*p)[1] for p in pixels]), abs=1e-6)
    luma = [[0.299 * r + 0.587 * g + 0.114 * b for r, g, b in f.reshape(-1, 3) / 255] for f in frames]
    assert endless.contrast(frames) == pytest.approx(np.mean([np.std(values) for values in luma]), abs=1e-6)


@pytest.mark.parametrize("wrong", [None, "time in turns", "memory", "finite"])
def test_each_bar_can_be_missed(endless, wrong):
    times = [9.0] * 10 + [1.0] * 1000 + [1.04] * 100
    sizes = [None] * 109 + [64] + [None] * 999 + [65 if wrong == "memory" else 64]
    rows = {"seconds": times, "cpu_seconds": [1.0] * 1110, "saturation": times, "contrast": times, "bytes": sizes}
    turns = {"new": [1.0] * 100, "old": [0.94 if wrong == "time in turns" else 0.96] * 100}
    bars = endless.judge({**rows, "finite": [wrong != "finite"] + [True] * 1109}, turns, "cuda")
    assert {name for name, bar in bars.items() if not bar.get("met", True)} == ({wrong} if wrong else set())
    assert endless.judge({**rows, "finite": [True] * 1110}, turns, "cpu")["time in turns"]["met"]
    assert bars["saturation"]["early"] == 1


def test_what_is_compared(endless):
    for blocks, early, late in ((2500, (10, 110), (2400, 2500)), (50, (10, 30), (30, 50)), (3, (1, 2), (2, 3))):
        assert [(part.start, part.stop) for part in endless.compared(blocks)] == [early, late]
