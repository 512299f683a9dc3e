"""The loop: what is logged, what stops it, optimizer and EMA against their formulas."""

import json
import math
import os
import signal
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
import torch
from fake_ranks import on_ranks
from tiny_stage import stage_config

from longtake.config.groups import EmaConfig, OptimConfig, WandbConfig
from longtake.config.run import RunConfig
from longtake.errors import ConfigError, TrainingError
from longtake.objectives.base import LossResult
from longtake.parallel.mesh import Mesh
from longtake.run_folder import latest_checkpoint, read_manifest
from longtake.train import stage, throughput
from longtake.train.ema import EMA
from longtake.train.loop import Hooks, MetricWindow, iteration
from longtake.train.metrics import PhaseTimer, cut_from, read_rows
from longtake.train.optim import NetworkOptimizer


def test_rows_hold_the_published_names(tmp_path):
    tiny_run.run(
        tmp_path, Mesh(), hooks=Hooks(evaluate=lambda step: {"motion_ratio": np.float32(0.5), "entropy": math.nan})
    )
    rows = read_rows(tmp_path / "metrics.jsonl")
    steps = [row for row in rows if "critic_loss" in row]
    assert [row["step"] for row in steps] == list(range(8))
    assert ["generator_loss" in row for row in steps] == [True, False] * 4
    assert {"critic_grad_norm", "batch_mean", "seconds", "seconds/data", "seconds_of/critic"} <= steps[0].keys()
    validations = [row for row in rows if "motion_ratio" in row]
    assert [row["step"] for row in validations] == [0, 4, 8] and validations[0]["entropy"] is None
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_accumulation_does_not_change_the_run(tmp_path):
    one, four = tiny_run.run(tmp_path / "1", Mesh()), tiny_run.run(tmp_path / "4", Mesh(), accumulation=4)
    for a, b in zip(one.tensors().values(), four.tensors().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert one.data_position == four.data_position


def test_a_loss_that_the_objective_reports_is_logged_as_it_is(tmp_path, monkeypatch):
    """What is minimised may be more than what has that name (`data_loss`), in one micro-batch or in several."""
    plain = tiny_run.TwoPlayers.loss

    def reported(self, turn, batch, step):
        result = plain(self, turn, batch, step)
        return LossResult(result.loss, {**result.metrics, "generator_loss": 2.5} if turn == "generator" else {})

    monkeypatch.setattr(tiny_run.TwoPlayers, "loss", reported)
    for accumulation in (1, 4):
        tiny_run.run(tmp_path / str(accumulation), Mesh(), accumulation=accumulation)
        rows = read_rows(tmp_path / str(accumulation) / "metrics.jsonl")
        assert [row["generator_loss"] for row in rows if "generator_loss" in row] == [2.5] * 4
        assert all(row["critic_loss"] != 2.5 for row in rows if "critic_loss" in row)


def test_non_finite_loss_stops_before_the_optimizer_step(tmp_path):
    with pytest.raises(TrainingError, match="step 4, generator: loss=.nan"):
        tiny_run.run(tmp_path, Mesh(), nan_at=4)
    before = tiny_run.run(tmp_path / "before", Mesh(), steps=4, save_every=1)
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step_000003"
    state, objective = tiny_run.build(Mesh(), nan_at=4)
    rows = tiny_run.Rows(Mesh())
    for _ in range(4):
        iteration(
            state,
            objective,
            rows,
            RunConfig(name="run", logdir="unused", max_steps=9),
            Mesh(),
            PhaseTimer(),
            MetricWindow(),
        )
    with pytest.raises(TrainingError):
        iteration(
            state,
            objective,
            rows,
            RunConfig(name="run", logdir="unused", max_steps=9),
            Mesh(),
            PhaseTimer(),
            MetricWindow(),
        )
    for a, b in zip(state.tensors().values(), before.tensors().values(), strict=True):
        assert torch.equal(a, b)
    assert state.step == 4


def test_non_finite_gradient_of_a_finite_loss_stops_too(tmp_path):
    state, objective = tiny_run.build(Mesh())
    parameter = state.networks["critic"].head.bias
    parameter.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingError, match="step 0, critic"):
        iteration(
            state,
            objective,
            tiny_run.Rows(Mesh()),
            RunConfig(name="run", logdir="unused", max_steps=9),
            Mesh(),
            PhaseTimer(),
            MetricWindow(),
        )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_skipped_update_changes_nothing(tmp_path, accumulation):
    """Step 4 has no finite update of either network: weights, moments and averages after it are those before it."""
    skip = {"loop": {"on_nonfinite": "skip", "max_skipped": 2}, "accumulation": accumulation}
    before = tiny_run.run(tmp_path / "before", Mesh(), steps=4, accumulation=accumulation)
    after = tiny_run.run(tmp_path / "after", Mesh(), steps=5, nan_at=4, **skip)
    assert (after.step, after.skipped, before.skipped) == (5, 2, 0)
    assert after.data_position == 5 * tiny_run.BATCH
    for name, value in before.tensors().items():
        assert torch.equal(after.tensors()[name], value), name
    row = [row for row in read_rows(tmp_path / "after" / "metrics.jsonl") if row["step"] == 4][-1]
    assert row["skipped_updates"] == 2 and "generator_loss" not in row and "batch_mean" not in row


def test_the_count_of_skipped_updates_survives_a_resume_and_ends_the_run(tmp_path, caplog):
    skip = {"loop": {"on_nonfinite": "skip", "max_skipped": 3}}
    tiny_run.run(tmp_path, Mesh(), steps=3, nan_at=2, **skip)
    assert "step 2, generator: loss=[nan]" in caplog.text and "the update is skipped (1 of 3)" in caplog.text
    assert read_manifest(tmp_path / "checkpoints/step_000003")["skipped"] == 2
    with pytest.raises(TrainingError, match="step 6, critic: .* 3 updates of this run were skipped before, as many as"):
        tiny_run.run(tmp_path, Mesh(), nan_at=6, **skip)
    state = tiny_run.run(tmp_path, Mesh(), **skip)  # without the cause it goes on
    assert (state.step, state.skipped) == (8, 2)


def test_sigterm_saves_and_exits_non_zero(tmp_path):
    def evaluate(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"motion_ratio": 1.0}

    with pytest.raises(SystemExit) as stopped:
        tiny_run.run(tmp_path, Mesh(), hooks=Hooks(evaluate=evaluate))
    assert stopped.value.code == 143
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step_000004"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_error_in_the_objective_is_not_swallowed(tmp_path):
    def broken(step):
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError):
        tiny_run.run(tmp_path, Mesh(), hooks=Hooks(evaluate=broken))


def test_optimizer_equals_torch_with_clipping_and_warm_up():
    torch.manual_seed(0)
    ours, theirs = tiny_run.Tiny(0), tiny_run.Tiny(0)
    config = OptimConfig(lr=1e-2, beta1=0.5, beta2=0.9, eps=1e-7, weight_decay=0.1, warmup_steps=4, max_grad_norm=0.1)
    optimizer = NetworkOptimizer(ours, config, 6)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.5, 0.9), eps=1e-7, weight_decay=0.1)
    for step in range(6):
        x = torch.randn(8, tiny_run.WIDTH)
        for network, zero in ((ours, optimizer.zero_grad), (theirs, reference.zero_grad)):
            zero()
            network(x).square().sum().backward()
        norm = optimizer.gradient_norm().item()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        reference.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 4)
        optimizer.step(step, norm)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_ema_follows_its_formula_and_gives_the_weights_back():
    network = tiny_run.Tiny(0)
    ema = EMA(network, EmaConfig(decay=0.9, start_step=1))
    expected = None
    for step in range(4):
        with torch.no_grad():
            network.head.weight.add_(step + 1)
        ema.update(step)
        weight = network.head.weight.detach().clone()
        expected = weight if step <= 1 else 0.9 * expected + 0.1 * weight
        torch.testing.assert_close(ema.tensors()["head.weight"], expected)
    with ema.applied():
        torch.testing.assert_close(network.head.weight.detach(), expected)
    assert torch.equal(network.head.weight, weight)
    half = tiny_run.Tiny(0).to(torch.bfloat16)
    assert EMA(half, EmaConfig()).tensors()["head.weight"].dtype == torch.float32


def test_rows_of_an_interrupted_run_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(6)) + '{"step": 6, "los')
    cut_from(path, 4)
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3]


def test_wandb_is_asked_for_and_missing(workshop, tmp_path, monkeypatch):
    config = stage_config(workshop, tmp_path, "causal", wandb={"enabled": True, "project": "p"})
    monkeypatch.setattr(stage, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb.enabled=true needs the package wandb"):
        stage.run_stage(config, Mesh())


def test_wandb_gets_the_rows(tmp_path, monkeypatch):
    seen = []
    wandb = SimpleNamespace(
        init=lambda **given: seen.append(given), log=lambda row, step: seen.append((step, row)), finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tiny_run.run(tmp_path, Mesh(), steps=1, loop={"wandb": WandbConfig(enabled=True, project="p")})
    assert seen[0] == {"dir": str(tmp_path), "project": "p"} and seen[1][0] == 0 and "critic_loss" in seen[1][1]


def test_settings_refuse_zero():
    with pytest.raises(ConfigError, match="log_every: got 0; must be greater than 0"):
        RunConfig(name="run", logdir="unused", max_steps=10, log_every=0)
    with pytest.raises(ConfigError, match="keep_checkpoints: got 0; must be greater than 0"):
        RunConfig(name="run", logdir="unused", max_steps=10, keep_checkpoints=0)


def test_save_every_zero_saves_nothing(tmp_path, caplog):
    def evaluate(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"motion_ratio": 1.0}

    tiny_run.run(tmp_path / "whole", Mesh(), steps=3, save_every=0)
    assert len(read_rows(tmp_path / "whole" / "metrics.jsonl")) == 3
    with pytest.raises(SystemExit):
        tiny_run.run(tmp_path / "stopped", Mesh(), hooks=Hooks(evaluate=evaluate), save_every=0)
    assert "nothing is saved" in caplog.text
    assert not list(tmp_path.glob("*/checkpoints/*"))


def test_rows_hold_the_peak_of_gpu_memory(tmp_path, monkeypatch):
    """What the device reports, once a row; and no such number on a CPU."""
    peaks = iter([3 << 30, 2 << 30])
    monkeypatch.setattr(throughput, "_peaks", lambda device: [4 << 30, next(peaks)])
    tiny_run.run(tmp_path / "gpu", Mesh(), steps=2)
    monkeypatch.undo()
    tiny_run.run(tmp_path / "cpu", Mesh(), steps=2)
    rows = {name: read_rows(tmp_path / name / "metrics.jsonl") for name in ("gpu", "cpu")}
    assert [row["memory_gib"] for row in rows["gpu"]] == [3, 2]
    assert not any("memory_gib" in row for row in rows["cpu"])


def test_peak_memory_is_that_of_the_fullest_rank(monkeypatch):
    peaks = threading.local()
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 99)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks.value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(peaks, "value", 0))

    def work(mesh):
        peaks.value = 10 + mesh.rank
        mesh = replace(mesh, device=torch.device("cuda"))
        return throughput.Throughput().take(mesh)["memory_gib"] * 2**30, peaks.value

    assert on_ranks(work) == [(11, 0)] * 2
    assert "memory_gib" not in throughput.Throughput().take(Mesh())
