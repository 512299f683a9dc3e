"""PhaseTimer, rates, utilisation and the profiler's trace."""

import gzip
import json
import os
import time
from dataclasses import replace

import pytest
import tiny_run
import torch
from fake_ranks import on_ranks
from tiny_objectives import parts_of
from tiny_plan import tiny_plan
from tiny_stage import TEACHER, make_model, stage_config

from longtake.config.groups import ProfileConfig
from longtake.devices import DEVICES, find_device
from longtake.models import flops
from longtake.models.flops import Call
from longtake.objectives.base import Objective
from longtake.objectives.dmd import Dmd, DmdConfig
from longtake.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from longtake.parallel.mesh import Mesh, let_segments_grow
from longtake.train import metrics as metrics_log
from longtake.train.metrics import PhaseTimer, read_rows
from longtake.train.stage import run_stage
from longtake.train.throughput import Throughput, operations_of, recorded, stage_throughput


class Steps:
    """A clock that each mark moves on by one second, and that is read late, as events of a GPU are."""

    def __init__(self):
        self.now, self.read = -1, 0

    def mark(self):
        self.now += 1
        return self.now

    def seconds(self, start, end):
        self.read += 1
        return float(end - start)


@pytest.fixture
def clock(monkeypatch):
    clock = Steps()
    monkeypatch.setattr(metrics_log, "_wall_seconds", clock.seconds)
    monkeypatch.setattr(metrics_log, "_wall_clock", clock.mark)
    return clock


# ---- phases -----------------------------------------------------------------------------------------------------------
def test_phases_do_not_overlap_and_add_up(clock):
    phases = PhaseTimer()
    assert phases.open == () and phases.last is None
    with phases("forward"):  # mark 1; 0 to 1 is in no phase
        with phases("rollout"):
            assert phases.open == ("forward", "rollout") and phases.known == set()
        assert phases.open == ("forward",) and phases.last == "rollout"
        with phases("scores"):
            pass
    assert clock.read == 0  # nothing is read before it is asked for
    taken = phases.take()  # marks 2 .. 7
    assert taken == {"seconds/other": 2, "seconds/forward": 3, "seconds/rollout": 1, "seconds/scores": 1}
    assert sum(taken.values()) == clock.now
    with phases("data"):
        pass
    assert phases.take() == {"seconds/other": 2, "seconds/data": 1}


def test_a_phase_that_fails_ends(clock):
    phases = PhaseTimer()
    with pytest.raises(ValueError), phases("forward"), phases("rollout"):
        raise ValueError
    assert phases.open == () and phases.last == "forward" and phases.take()["seconds/rollout"] == 1


def test_wholes_count_whatever_is_inside(clock):
    phases = PhaseTimer()
    with phases.whole("critic"), phases("forward"), phases("rollout"):
        pass
    assert phases.take()["seconds_of/critic"] == 5.0 and "seconds_of/critic" not in phases.take()


def test_marks_do_not_pile_up(clock, monkeypatch):
    monkeypatch.setattr(metrics_log, "_MOST_MARKS", 10)
    phases = PhaseTimer()
    for _ in range(50):
        with phases("data"):
            pass
    assert len(phases._pieces) < 10 and phases.take() == {"seconds/other": 51, "seconds/data": 50}


def test_the_wall_clock_is_the_default():
    phases = PhaseTimer(torch.device("cpu"))
    with phases("data"):
        time.sleep(0.02)
    assert 0.02 <= phases.take()["seconds/data"] < 1


@pytest.mark.gpu
def test_events_count_kernels_where_they_run():
    """A product that is queued in one phase and waited for in the next belongs to the first."""
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    a @ a
    torch.cuda.synchronize()
    phases = PhaseTimer(device)
    with phases("product"):
        for _ in range(20):
            a @ a
    with phases("wait"):
        torch.cuda.synchronize()
    taken = phases.take()
    assert taken["seconds/product"] > 10 * taken["seconds/wait"]


# ---- rates ------------------------------------------------------------------------------------------------------------
def test_rows_tell_samples_and_utilisation(monkeypatch):
    throughput = Throughput(lambda step: 1e12 * (step + 1), peak=4e12)
    throughput.add(0, 1.0, 8)
    throughput.add(1, 2.0, 8)
    row = throughput.take(Mesh())
    assert row["speed/samples_per_second"] == pytest.approx(16 / 3)
    assert row["speed/model_tflops"] == pytest.approx(1) and row["speed/mfu"] == pytest.approx(1 / 4)
    assert throughput.take(Mesh()) == {}  # nothing was done since
    unknown = Throughput(lambda step: 1e12)
    unknown.add(0, 1.0, 1)
    assert "speed/mfu" not in unknown.take(Mesh())

    def slowest(mesh):
        throughput = Throughput()
        throughput.add(0, 1.0 + mesh.rank, 6)
        return throughput.take(mesh)

    assert on_ranks(slowest) == [{"speed/samples_per_second": 3.0}] * 2


def test_memory_reserved_is_read_before_the_peaks_are_reset(monkeypatch):
    read = []
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: read.append("reserved") or 3 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: read.append("allocated") or 2 << 30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: read.append("reset"))
    row = Throughput().take(replace(Mesh(), device=torch.device("cuda")))
    assert row == {"memory_reserved_gib": 3, "memory_gib": 2} and read == ["reserved", "allocated", "reset"]


def test_peaks_are_found_by_the_name_that_torch_reports():
    assert find_device("NVIDIA H200").peak("bf16") == 989e12 and find_device("h200").name == "H200"
    assert find_device("NVIDIA H100 80GB HBM3").name == "H100" and find_device("NVIDIA H100 PCIe") is None
    assert find_device("NVIDIA A100-SXM4-80GB").peak("fp32") == 19.5e12 and find_device("Radeon") is None
    assert all(find_device(device.name) is device for device in DEVICES)


def test_an_unknown_device_is_named_once(monkeypatch, caplog):
    mesh = replace(Mesh(), device=torch.device("cuda"))
    for name, known in (("Test 1", False), ("NVIDIA H200", True)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        with caplog.at_level("INFO"):
            throughput = stage_throughput("bf16", None, mesh)
        assert (throughput._peak is not None) == known
    assert "speed/mfu is not logged: the peak rate of Test 1 is not known" in caplog.text


def test_operations_are_shared_by_the_ranks():
    objective = FlowMatching(parts_of(make_model()), FlowMatchingConfig())
    call = Call.bidirectional(4, 5, 16, TEACHER.text_len, 17)
    expected = flops.forward(TEACHER, call).total + flops.backward(TEACHER, call).total
    for ranks in (1, 4):
        networks = {"generator": TEACHER}, {"generator": None}, {"generator": call}
        assert operations_of(objective, *networks, ranks)(0) == expected / ranks


@pytest.fixture(scope="module")
def rows(workshop, tmp_path_factory):
    """Rows of a distillation of three iterations with a row for every second one, and a trace of the second."""
    folder = tmp_path_factory.mktemp("distill")
    changes = {"log_every": 2, "max_steps": 3, "save_every": 2, "profile": {"num_steps": 1, "start_step": 1}}
    config = stage_config(workshop, folder, "distill", **changes)
    run_stage(config, Mesh())
    return config.folder, read_rows(config.folder / "metrics.jsonl")


def test_a_stage_logs_its_rates_and_no_utilisation_on_a_cpu(rows):
    for row in rows[1]:
        assert row["speed/samples_per_second"] > 0 and row["speed/model_tflops"] > 0 and "speed/mfu" not in row
        names = {"data", "rollout", "scores", "forward", "backward", "optimizer", "other"}
        assert {f"seconds/{name}" for name in names} <= row.keys()
        assert row["seconds_of/critic"] < sum(value for name, value in row.items() if name.startswith("seconds/"))
    saved = [row for row in rows[1] if "seconds/checkpoint" in row]
    assert len(saved) == 1


def test_more_operations_in_iterations_that_update_the_student():
    dmd = Dmd(parts_of(*(make_model(seed=k) for k in range(3)), plan=tiny_plan(2, 1, 5, 1)), DmdConfig(teacher="toy"))
    names = ("generator", "critic", "teacher")
    call = Call.bidirectional(4, 7, 16, TEACHER.text_len, 17)
    operations = operations_of(dmd, dict.fromkeys(names, TEACHER), dict.fromkeys(names), dict.fromkeys(names, call), 1)
    assert operations(0) > 1.5 * operations(1) == operations(2) * 1.5


def test_an_objective_that_does_not_say_its_calls_has_no_utilisation():
    class Silent(Objective):
        pass

    assert operations_of(Silent(parts_of(make_model())), {}, {}, {}, 1) is None


# ---- the trace --------------------------------------------------------------------------------------------------------
def test_a_trace_holds_the_phases_of_the_wanted_iteration(rows):
    (file,) = (rows[0] / "profile").iterdir()
    assert file.name == "step_000001_rank_0.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"rollout", "scores", "backward", "optimizer", "critic"} <= names and "generator" not in names


def test_a_run_that_ends_inside_the_recording_writes_what_there_is(tmp_path):
    tiny_run.run(tmp_path, Mesh(), steps=3, save_every=0, loop={"profile": ProfileConfig(num_steps=9, start_step=1)})
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "step_000001_rank_0.json.gz"


def test_only_wanted_ranks_are_recorded(tmp_path):
    for every, expected in ((False, {0}), (True, {0, 1})):
        folder = tmp_path / str(every)
        for rank in (0, 1):
            config = ProfileConfig(num_steps=1, start_step=2, every_rank=every)
            with recorded(config, folder, Mesh(rank, 2), 3) as recorder:
                for _ in range(6):
                    recorder()
        files = {f"step_000005_rank_{rank}.json.gz" for rank in expected}
        assert {file.name for file in (folder / "profile").iterdir()} == files


@pytest.mark.parametrize("given", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocators_pieces_grow_unless_the_environment_says_something_else(monkeypatch, given):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    let_segments_grow()
    told = {name: os.environ[name] for name in names if name in os.environ}
    assert told == ({names[1]: "expandable_segments:True"} if given is None else {given: "max_split_size_mb:64"})
