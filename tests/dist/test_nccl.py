"""The CUDA path: FSDP2 over nccl, one rank (all that one GPU allows), with a resume, and with what makes training fast,
on two where there are two GPUs; there also passes that ranks share, recorded.
"""

import json
import subprocess
import sys

import graph_run
import pytest
import sharded_run
import tiny_run
import torch
import torch.distributed as dist
from forked_ranks import torchrun
from torch.distributed.device_mesh import init_device_mesh

from longtake.parallel.mesh import Mesh
from longtake.parallel.fsdp import parallelize
from longtake.checkpoint.save import RunInfo, Snapshot, load_checkpoint, save_checkpoint
from longtake.config.groups import EmaConfig, OptimConfig
from longtake.config.run import RunConfig
from longtake.train.loop import MetricWindow, iteration
from longtake.train.metrics import PhaseTimer
from longtake.train.state import TrainState



class CudaRows(tiny_run.Rows):
    def __next__(self):
        return [batch.cuda() for batch in super().__next__()]


def build(mesh, param_dtype):
    networks = {
        name: parallelize(tiny_run.Tiny(i).cuda(), mesh, param_dtype=param_dtype)
        for i, name in enumerate(("generator", "critic"))
    }
    optimizers = dict.fromkeys(networks, OptimConfig(lr=1e-2, beta1=0.9, max_grad_norm=0.5))
    averages = {"generator": EmaConfig(decay=0.9, start_step=0)}
    state = TrainState.build(networks, optimizers, averages, max_steps=9)
    return state, tiny_run.TwoPlayers(networks)


def iterate(state, objective, mesh, count):
    rows, window = CudaRows(mesh), MetricWindow()
    rows.seek(state.data_position)
    for _ in range(count):
        iteration(state, objective, rows, RunConfig(name="run", logdir="unused", max_steps=9), mesh, PhaseTimer(), window)
    return {name: value for name, value in window.take(mesh).items() if name != "seconds"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fsdp_over_nccl_equals_one_device_and_resumes(tmp_path, monkeypatch):
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    plain = Mesh(device=torch.device("cuda", 0))
    expected = iterate(*build(plain, None), plain, 4)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", 0))
    with Mesh(0, 1, plain.device, init_device_mesh("cuda", (1,), mesh_dim_names=("shard",))) as mesh:
        assert iterate(*build(mesh, None), mesh, 4) == pytest.approx(expected, rel=1e-4)
        state, objective = build(mesh, None)
        iterate(state, objective, mesh, 2)
        assert state.networks["generator"].head.weight.dtype == torch.float32
        snapshot = Snapshot.of(state, ("generator",))
        path = save_checkpoint(snapshot, tmp_path, mesh=mesh, info=RunInfo(), keep=1)
        other, again = build(mesh, None)
        load_checkpoint(other, path, mesh=mesh, invariants={})
        assert iterate(state, objective, mesh, 2) == iterate(other, again, mesh, 2)
        for a, b in zip(state.tensors().values(), other.tensors().values(), strict=True):
            assert torch.equal(a, b) if a.ndim == 0 else torch.equal(a.full_tensor(), b.full_tensor())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sharded_networks_are_fused_and_keep_what_whole_ones_do(tmp_path):
    """On as many GPUs as there are, at most two."""
    ranks = min(2, torch.cuda.device_count())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [sharded_run.__file__, str(tmp_path), "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    files = list(tmp_path.glob("rank*.json"))
    assert len(files) == ranks
    for found in (json.loads(path.read_text()) for path in files):
        sharded, whole = found["sharded"], found["whole"]
        assert sharded["fuses"] and sharded["compiled"] > 0
        assert sharded["first"] == whole["first"] == [False, "products", True, "selective"]
        assert sharded["decided"] == whole["decided"] == [False] * 4  # there is room for these
        assert sharded["before and after"] < 1e-2 and found["apart"] < 2e-2  # in bfloat16
        if ranks > 1:
            assert sharded["gathers"] == sharded["units"]  # once in a backward, whatever of a block it computes again


def assert_shared(folder):
    """What `graph_run` leaves."""
    files = list(folder.glob("rank*.json"))
    assert len(files) == 2
    for path in files:
        found = json.loads(path.read_text())
        streamed, rolled_out = found["streamed"], found["rolled out"]
        assert streamed["equal"] and streamed["recorded"] >= 2 and not streamed["given up"]
        assert rolled_out["recorded"] >= 2 and rolled_out["difference"] < 1e-4
        assert found["learnt"] < 5e-2  # in bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("segments", ["expandable_segments:True", "expandable_segments:False"])
def test_two_ranks_record_the_passes_they_share(tmp_path, monkeypatch, segments):
    """And learn from roll-outs of these. It hung with growing segments, until NCCL was told not to register what a graph
    exchanges (`init_mesh`).
    """
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", segments)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [graph_run.__file__, str(tmp_path), "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_shared(tmp_path)


@pytest.mark.whole
def test_the_same_of_two_cpu_ranks(tmp_path):
    done = torchrun(2, graph_run.__file__, tmp_path, "cpu")
    assert done.returncode == 0, done.stderr[-4000:]
    assert_shared(tmp_path)
