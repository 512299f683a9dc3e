"""What a stream takes of a GPU's memory, traced without one: parts, and which choices fit."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.generation import generation_settings
from longtake.doctor.machine import fits
from longtake.doctor.streaming import StreamReport, stream_choices
from longtake.errors import ConfigError
from longtake.weights.presets import model_config

GIB = 2**30
NAMES = ("precision", "decoder", "low_memory", "window_frames")


@pytest.fixture(scope="module")
def choices():
    settings = generation_settings(None, {"precision": "bf16"})
    return list(stream_choices(model_config("wan2.1-fun-1.3b-inp"), settings))


def test_the_parts_are_those_that_a_gpu_showed(choices):
    """`memory_gib` of `longtake bench` on an H200 (docs/log/full-size.md): lasting parts exactly."""
    measured = {"transformer": 2.9464, "text encoder": 10.5815, "VAE": 0.2364, "image encoder": 1.1749, "cache": 3.4813}
    there = choices[0].there
    assert {name: pytest.approx(there[name] / GIB, rel=3e-3) for name in measured} == measured
    assert there["decoder"] / GIB == pytest.approx(1.76 + 0.14, rel=0.02)  # its state and its weights' other layout
    assert choices[0].total == sum(there.values()) + max(choices[0].work.values())


def test_choices_take_less_in_the_order_of_their_price(choices):
    asked, low, tiny, fp8 = (
        next(c for c in choices if tuple(c.tree()[name] for name in NAMES) == wanted)
        for wanted in (
            ("bf16", "exact", False, 13), ("bf16", "exact", True, 13), ("bf16", "tiny", True, 13), ("fp8", "tiny", True, 13)
        )
    )  # fmt: skip
    assert asked is choices[0] and asked.total > low.total > tiny.total > fp8.total
    shorter = next(c for c in choices if c.tree()["window_frames"] == 9)
    assert shorter.there["cache"] * 13 == asked.there["cache"] * 9
    assert low.there["text encoder"] == 2 * 2 * 4096 * 10240


def test_the_report_names_what_fits(choices, monkeypatch):
    def reported(room, where):
        return StreamReport(room, where, choices[0], choices[1:])

    room = int(12 * GIB)
    report = reported(room, "--device 12GB")
    assert not report.ok and report.others and any(fits(choice.total, room) for choice in report.others)
    problem, first = str(report).splitlines()[:2]
    assert problem.startswith("PROBLEM: 24.4") and "do not fit into 12.00 GiB" in problem
    assert first.split()[:3] == ["precision=bf16", "decoder=exact", "low_memory=true"] and first.endswith("  fits")
    assert len(report.tree()["others"]) == sum(fits(choice.total, room) for choice in report.others)
    assert "no choice fits" in str(reported(GIB, "here"))
    assert (fine := reported(100 * GIB, "here")).ok and str(fine).startswith("it fits: 24.4")
    monkeypatch.setattr("longtake.doctor.run.stream_choices", lambda *_, **__: iter(choices))
    made = CliRunner().invoke(app, ["doctor", "--stream", "wan2.1-t2v-1.3b", "height=64", "--device", "24GB", "--json"])
    assert made.exit_code == 1 and json.loads(made.output)["asked"]["total"] == choices[0].total


def test_sizes_whose_encoders_are_not_known_are_refused():
    """The toy's are its own, and no VAE of 20 channels is published."""
    toy = CliRunner().invoke(app, ["doctor", "--stream", "toy", "--device", "24GB"])
    assert toy.exit_code == 2 and "toy has small encoders of its own" in toy.output
    sizes = dataclasses.replace(model_config("wan2.1-t2v-1.3b"), in_channels=20, out_channels=20)
    odd = CliRunner().invoke(app, ["doctor", "--stream", "wan2.1-t2v-1.3b", "height=100", "--device", "24GB"])
    assert odd.exit_code == 2 and "height=100 must be a positive multiple of 16" in odd.output
    with pytest.raises(ConfigError, match="no VAE of 20 latent channels is published, only of 16 and 48"):
        list(stream_choices(sizes, generation_settings()))
