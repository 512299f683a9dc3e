"""`longtake bench` of a stream and of a training on a CPU: what it writes, and that its parts agree with each other."""

import json
from dataclasses import replace

import pytest
import torch
from toy_assets import toy
from typer.testing import CliRunner

from longtake.bench import random_models, report, watched
from longtake.bench.clock import percentiles, playback, seconds_of
from longtake.bench.kernels import (
    Attention,
    Convolution,
    Product,
    best_layouts,
    decode_operations,
    floor_seconds,
    pass_operations,
)
from longtake.bench.streaming import bench_stream
from longtake.bench.training import WARM_UP, Bench, Kind, Lap, summary
from longtake.cli.app import app
from longtake.config.job import load_config
from longtake.doctor.files import look_at
from longtake.encoders import original
from longtake.models.flops import Call, forward
from longtake.models.sizes import DiTConfig
from longtake.parallel.mesh import Mesh
from longtake.weights.presets import PRESETS

CPU = torch.device("cpu")
CALL = Call.bidirectional(1, 4, 1560, 512, 257).cached(4, 9, with_context=False)


def bench(tmp_path, *arguments):
    file = tmp_path / "bench.json"
    result = CliRunner().invoke(app, ["bench", *arguments, "--device", "cpu", "--json", str(file)])
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text()), result.output


# ---- a stream --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return bench(tmp_path_factory.mktemp("bench"), "--random", "toy", "--blocks", "3", "--size", "32x32")


def test_a_stream_has_all_numbers(stream):
    found, _ = stream
    kinds = {"ms": dict, "fps": dict, "first_frame_s": dict, "gaps_ms": dict, "rates_tflops": dict, "floor_ms": dict}
    kinds |= {"device": str, "versions": dict, "plan": dict, "kernels": dict, "stalls": dict}
    kinds |= {"rtf": float, "peak_gib": float, "compile_s": float}
    assert {name: type(found[name]) for name in kinds} == kinds
    assert set(found["ms"]) == {
        *["text", "clip", "y", "passes", "context", "decode", "copy", "write", "rest", "launch", "first"]
    }
    assert set(found["ms"]["first"]) == {"picture", "text", "clip", "y", "passes", "decode", "copy"}
    assert set(found["floor_ms"]) == {"pass", "decode"} and set(found["first_frame_s"]) == {"warm", "cold"}
    assert set(found["gaps_ms"]) == {"p50", "p90", "p99"} and set(found["fps"]) == {"loop", "end_to_end"}
    assert found["plan"]["height"] == 32 and len(found["ms"]["passes"]) == len(found["plan"]["sigmas"]) == 4
    assert all(rate > 0 for rate in found["rates_tflops"].values()) and len(found["rates_tflops"]) > 6


def test_the_parts_of_a_stream_add_up(stream):
    found, _ = stream
    ms, frames = found["ms"], found["blocks"]["frames"]
    loop = sum(ms["passes"]) + ms["context"]
    assert frames == 16
    assert loop + ms["decode"] + ms["copy"] + ms["rest"] == pytest.approx(found["block_ms"])
    assert abs(ms["rest"]) < 0.5 * found["block_ms"]  # the parts are the block, but for what a busy machine does beside
    assert found["fps"]["loop"] == pytest.approx(1000 * frames / loop)
    assert found["fps"]["end_to_end"] == pytest.approx(1000 * frames / found["block_ms"])
    assert found["rtf"] == pytest.approx(16 / found["fps"]["end_to_end"])
    assert found["first_frame_s"]["cold"] > found["load_s"]
    assert 0 < found["gaps_ms"]["p50"] <= found["gaps_ms"]["p90"] <= found["gaps_ms"]["p99"]


def test_a_stream_is_told_in_words(stream):
    found, output = stream
    assert f"fps: end_to_end {' ' * 3}" in output or "fps: end_to_end" in output
    assert "random" in found["weights"] and "random" in output


@pytest.mark.whole
def test_a_stream_after_a_warm_up():
    settings = random_models.random_settings("toy", {"height": 32, "width": 32})
    generator = random_models.random_generator("toy", settings, CPU, decode_device="cpu")
    found = bench_stream(generator, 1.0, blocks=1, warm_up=True)
    first = found["first_frame_s"]
    assert first["cold"] is None and 0 < first["warm"] < found["warm_up_s"]
    assert generator.decoder is not generator.encoders.vae and found["ms"]["decode"] > 0  # where it decodes


@pytest.mark.whole
def test_the_last_block_of_a_video_does_not_count_where_blocks_are_made_ahead(monkeypatch):
    """It comes early, since no other is begun before it is handed over; a mean with it flatters."""
    settings = random_models.random_settings("toy", {"height": 32, "width": 32})
    made, watch, seen = random_models.random_generator("toy", settings, CPU), watched.watch, []

    def hasty(*given):
        seen.append(video := watch(*given))
        even = [0.1 * index for index in range(len(video.arrivals))]
        return replace(video, arrivals=[*even[:-1], even[-2] + 1e-6])

    monkeypatch.setattr(watched, "watch", hasty)
    monkeypatch.setattr(type(made), "is_ahead", True)
    found = bench_stream(made, 1.0, blocks=2, warm_up=True)
    assert found["block_ms"] == pytest.approx(100) and found["gaps_ms"]["p50"] == pytest.approx(100)
    assert found["blocks"]["counted"] == 2 and len(seen[0].frames) == 2 + found["blocks"]["settled_from"] + 3


@pytest.mark.whole
def test_a_student_whose_last_step_stores_has_no_context_pass():
    """Of a settled block: the passes of later blocks alone, though the first one has more."""
    rules = {"height": 32, "width": 32, "later_steps": [1.0, 0.5]}
    settings = random_models.random_settings("toy", rules)
    settings = settings.model_copy(update={"plan": settings.plan.model_copy(update={"context": "last_step"})})
    found = bench_stream(random_models.random_generator("toy", settings, CPU), 1.0, blocks=1, warm_up=True)
    assert len(found["ms"]["passes"]) == 2 and min(found["ms"]["passes"]) > 0 and found["ms"]["context"] == 0


@pytest.mark.whole
def test_a_stream_without_a_picture(monkeypatch):
    toy_sizes = random_models.model_config("toy")
    sizes = replace(toy_sizes, model_type="t2v", in_channels=toy_sizes.out_channels, image_dim=None)
    monkeypatch.setattr(random_models, "model_config", lambda preset: sizes)
    plan = {"block_frames": 3, "first_frames": 3, "window_frames": 9, "sink_frames": 3, "context": "last_step"}
    settings = random_models.random_settings("toy", {"height": 32, "width": 32, "plan": plan, "precision": "fp8"})
    found = bench_stream(random_models.random_generator("toy", settings, CPU), 1.0, blocks=2, warm_up=True)
    assert found["blocks"]["frames"] == 12 and len(found["ms"]["passes"]) == 4 and found["ms"]["context"] == 0
    assert found["ms"]["first"]["picture"] is found["ms"]["first"]["y"] is None and found["first_frame_s"]["warm"] > 0


def test_one_source_at_a_time(tmp_path):
    result = CliRunner().invoke(app, ["bench", "--random", "toy", "--model", "toy"])
    assert result.exit_code == 2 and "give one of" in result.output
    result = CliRunner().invoke(app, ["bench", "--size", "480"])
    assert result.exit_code == 2 and "height x width" in result.output
    result = CliRunner().invoke(app, ["bench", "--random", "toy", "--size", "10x32"])
    assert (result.exit_code, result.output) == (
        2, "ConfigError: height=10 must be a positive multiple of 16; set it to 16 or 32\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["toy/distill", "--blocks", "3"], "--blocks is of a stream, and CONFIG of a training"),
        (["toy/distill", "--warm-up"], "--warm-up is of a stream"),
        (["--steps", "3"], "--steps is of a training; give its CONFIG, too"),
        (["--random", "toy", "--memory", "20"], "--memory is of a training"),
        (["--model", "toy", "--small-text"], "--small-text goes with --random"),
        (["--random", "toy", "--encoders", "toy"], "--encoders goes with --model"),
    ],
)
def test_no_option_is_passed_over(words, told):
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == 2 and told in " ".join(result.output.split()), result.output


def test_no_gpu_is_asked_for_versions(monkeypatch):
    """A rank that looked at all GPUs would take memory of each, and so change what it measures."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("GPUs are counted"))
    assert report.machine(CPU)["versions"]["torch"] == torch.__version__


def test_random_encoders_of_a_published_kind(monkeypatch):
    """Built of the published parts, here with few and narrow layers."""
    small = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 0}
    sizes = {"dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 1, "in_channels": 36, "text_dim": 32}
    dit = DiTConfig(**sizes, text_len=48, freq_dim=32, model_type="i2v", image_dim=1280)
    monkeypatch.setitem(original.PUBLISHED_VAE, 16, small)
    monkeypatch.setattr(
        random_models, "_IMAGE", random_models._IMAGE | {"num_hidden_layers": 2, "intermediate_size": 8}
    )
    monkeypatch.setattr(random_models, "model_config", lambda preset: dit)
    changes = {"height": 32, "width": 32, "precision": "bf16", "plan": {"window_frames": 9, "sink_frames": 1}}
    made = random_models.random_generator("wan", random_models.random_settings("wan", changes), CPU, small_text=True)
    assert made.encoders.text.text_len == 48 and made.encoders.image.num_tokens == 257
    assert made.model.blocks[0].self_attn.q.weight.dtype == made.encoders.image.dtype == torch.bfloat16
    chunks = list(made.stream(torch.zeros(32, 32, 3, dtype=torch.uint8).numpy(), "a circle", num_frames=17))
    assert sum(map(len, chunks)) == 17
    spare = random_models.random_settings("wan", {**changes, "low_memory": True, "decoder": "tiny"})
    made = random_models.random_generator("wan", spare, CPU, small_text=True)
    assert made.decoder.latents_per_call == 1  # as generation with low memory decodes, or the peak would be another


# ---- a training ------------------------------------------------------------------------------------------------------
SMALL = ["batch_size=1", "micro_batch_size=1", "video.height=32", "video.width=32"]


@pytest.mark.whole
@pytest.mark.parametrize("stage", [pytest.param("distill", marks=pytest.mark.slow), "causal", "long"])
def test_a_training_is_measured(stage, tmp_path):
    given = [*SMALL, f"logdir={tmp_path}/run"]
    if stage == "distill":
        given += ["validation.num_rows=1", "validation.times_longer=2"]
    found, output = bench(tmp_path, f"configs/toy/{stage}.yaml", *given, "--steps", "4")
    assert not (tmp_path / "run").exists()  # nothing is written there
    names = {"cycle_s", "critic_s", "critic_given_s", "generator_s", "phases", "mfu", "peak_gib", "floor_s"}
    assert (
        names | {"first_update_s", "compiled", "kept"} <= set(found) and found["mfu"] is None
    )  # a CPU has no peak here
    assert found["iterations"] == 4 and found["skipped_updates"] == 0 and "made in memory" in output
    assert sum(found["phases"].values()) == pytest.approx(found["iteration_s"], rel=0.2)
    assert found["floor_s"] > 0 and found["cycle_s"] > 0  # of `long` too, where the critic has a head start
    if stage == "distill":  # an update of the critic to each of the generator: four exits
        assert set(found["generator_s"]) == {"0", "1", "2", "3"} and found["critic_s"] == {}
        mean = sum(found["generator_s"].values()) / 4
        assert found["cycle_s"] == pytest.approx(mean + found["critic_given_s"])
        assert found["cycle_s"] == pytest.approx(found["iteration_s"], rel=0.2)
        assert found["validation"]["errors"] == 0 and found["validation"]["teacher_s_a_row"] > 0
        assert found["validation"]["seconds_between"] == pytest.approx(found["validation"]["seconds"] / 0.03)
    else:
        assert "validation" not in found
    if stage == "causal":
        assert set(found["generator_s"]) == {"all"}


def test_a_cycle_is_one_update_of_the_generator_and_those_of_the_critic():
    laps = [
        Lap(Kind(True, 0), 7.1, {"generator": 5.0, "critic": 2.0}),
        Lap(Kind(True, 3), 9.1, {"generator": 7.0, "critic": 2.0}),
        *[Lap(Kind(False, 0), 3.0, {"critic": 3.0})] * 3,
        Lap(Kind(False, 3), 5.0, {"critic": 5.0}),
    ]
    found = summary(laps, 5)
    assert found["critic_s"] == {"0": 3.0, "3": 5.0} and found["generator_s"] == {"0": 5.0, "3": 7.0}
    assert found["critic_given_s"] == 2.0
    assert found["cycle_s"] == 6 + 2 + 4 * 4  # exits are equally likely, however often each came
    assert summary(laps[:2], 5)["cycle_s"] is None  # no update of the critic alone was seen
    assert summary(laps, 5, 3)["cycle_s"] == 6 + 2 + 4 + 3 * 2  # three of the four on clips of another iteration


def test_a_limit_of_memory_is_that_of_a_gpu(tmp_path):
    given = ["bench", "configs/toy/distill.yaml", *SMALL, f"logdir={tmp_path}", "--memory", "22", "--device", "cpu"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2 and "--memory 22 limits what is taken of a GPU, and this runs on cpu" in result.output


def test_updates_on_kept_clips_are_counted_and_not_run(tmp_path):
    """Three of the four updates of the critic alone; beside the generator's it does the same on clips that are there."""
    given = ["objective.critic.updates_per_generator=5", "objective.critic.updates_per_rollout=4"]
    config = load_config("configs/toy/distill.yaml", [*SMALL, f"logdir={tmp_path}", *given])
    made = Bench(config, look_at(config), Mesh())
    assert made.cycle() == (5, 3)
    assert [made.rolls_out(step) for step in range(7)] == [True, True, False, False, False, True, True]
    assert all(made.rolls_out(step) for step in made.steps(8))
    assert {made.kind(step) for step in made.steps(8)} == {Kind(g, e) for g in (True, False) for e in range(4)}
    counted = [made.kind(step).exit_step for step in made.steps(8)[WARM_UP:]]
    assert counted == [3, 3, 0, 0, 2, 2, 1, 1]  # however few count, their mean is that of all
    kept, own = (made.work(step).total for step in (2, 1))
    assert 0 < kept < own


def test_long_videos_are_measured_from_their_beginning_after_the_head_start(tmp_path):
    """In order, since chunks go on from each other; the warm-up and what counts have an update of the generator."""
    given = ["objective.critic.updates_per_generator=5", "objective.critic.critic_warmup_steps=22"]
    config = load_config("configs/toy/long.yaml", [*SMALL, f"logdir={tmp_path}", *given])
    made = Bench(config, look_at(config), Mesh())
    steps = made.steps(8)
    assert steps == list(range(steps[0], steps[0] + WARM_UP + 8)) and steps[0] >= 22
    assert made.inner.chunk(steps[0]) == 0
    assert any(made.kind(step).generator for step in steps[:WARM_UP])
    assert {made.kind(step).generator for step in steps[WARM_UP:]} == {True, False}


# ---- clocks and kernels ----------------------------------------------------------------------------------------------
def test_playback_of_the_specification():
    gaps = [1, 0.5, 0.5, 2, 0.5]
    arrivals = [sum(gaps[: index + 1]) for index in range(5)]
    found = playback(arrivals, [12 / 16] * 5)
    assert (found.count, found.first_chunk, found.seconds) == (1, 3, 0.75)
    assert playback([1, 1.5], [1, 1]).first_chunk is None


def test_percentiles_are_interpolated():
    assert percentiles([1.0, 2.0]) == {"p50": 1.5, "p90": 1.9, "p99": pytest.approx(1.99)}


def test_seconds_of_work():
    calls = []
    assert seconds_of(lambda: calls.append(0), CPU, about=0.0) < 0.1
    assert len(calls) == 2


def test_the_operations_of_a_pass_are_those_that_are_counted():
    sizes = PRESETS["wan2.1-fun-1.3b-inp"]
    found = pass_operations(sizes, CALL)
    work = forward(sizes, CALL)
    products = sum(one.operations * count for one, count in found.items() if isinstance(one, Product))
    attention = sum(one.operations * count for one, count in found.items() if isinstance(one, Attention))
    assert products == pytest.approx(work.products) and attention == pytest.approx(work.attention)


def test_two_contexts_of_one_length_are_two_attentions():
    sizes = DiTConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=3, image_dim=8)
    found = pass_operations(sizes, Call.bidirectional(1, 1, 4, 8, 8))
    assert {one: n for one, n in found.items() if isinstance(one, Attention)} == {
        Attention(4, 4, 2, 12): 3,
        Attention(4, 8, 2, 12): 6,
    }


def test_the_operations_of_a_decoder():
    """Those of Wan2.1's VAE, whose work is known: 3.4 TFLOP a frame at 480x832 (a latent decodes into four)."""
    with torch.device("meta"):
        vae = original.random_vae(16)
    found = decode_operations(vae, 4, 60, 104)
    total = sum(one.operations * count for one, count in found.items())
    assert total / 16 == pytest.approx(3.39e12, rel=0.01)
    assert found[Attention(60 * 104, 60 * 104, 1, 384)] == 4  # one for each latent


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "frames"])
def test_a_layout_is_the_same_convolution(layout):
    from longtake.bench.kernels import Scratch

    one = Convolution((1, 4, 6, 8, 8), (5, 4, 3, 3, 3), (1, 1, 1), (0, 0, 0), layout)
    assert layout in one.layouts
    scratch = Scratch(CPU, torch.float32)
    scratch.reserve([10 * one.largest])
    made = one.work(scratch)()
    assert made.numel() == 5 * 4 * 6 * 6 and one.operations == 2 * made.numel() * 4 * 27
    last = one._taken(scratch, one.shape).is_contiguous(memory_format=torch.channels_last_3d)
    assert last == (layout != "contiguous")


def test_a_floor_runs_every_operation():
    vae = toy.build_vae()
    found = best_layouts(decode_operations(vae, 2, 4, 4), CPU, torch.float32)
    assert sum(found.values()) == sum(decode_operations(vae, 2, 4, 4).values())
    assert floor_seconds(found, CPU, torch.float32) > 0
