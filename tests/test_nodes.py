"""Several machines: the scripts parse and refuse what is wrong, and two "nodes" on 127.0.0.1 train one stage."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_stage import stage_tree

from longtake.config.stage import StageConfig
from longtake.parallel.mesh import Mesh
from longtake.run_folder import latest_checkpoint
from longtake.train.metrics import read_rows
from longtake.train.stage import run_stage

ROOT = Path(__file__).parent.parent
NODES, SBATCH = ROOT / "scripts" / "train_nodes.sh", ROOT / "scripts" / "slurm" / "train.sbatch"


def bash(*words, **environment):
    command = ["bash", *map(str, words)]
    options = {"capture_output": True, "text": True, "timeout": 60, "cwd": ROOT}
    return subprocess.run(command, env={**os.environ, **environment}, **options)


# ---- the scripts ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [NODES, SBATCH], ids=lambda path: path.name)
def test_scripts_parse(path):
    assert bash("-n", path).returncode == 0 and os.access(path, os.X_OK)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text


def test_help_names_every_option():
    shown = bash(NODES, "--help")
    options = set(re.findall(r"^ +(--[a-z-]+)\) ", NODES.read_text(), re.M))
    assert shown.returncode == 0 and "Usage: " in shown.stdout and {"--nodes", "--head", "--grace"} <= options
    assert all(option in shown.stdout for option in options) and "set -euo" not in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--node", "2"], "unknown option --node"),
        (["--nodes"], "--nodes needs a value"),
        (["--nodes", "two"], "--nodes 'two' must be a number of machines"),
        (["--nodes", "2"], "--head is missing"),
        (["--nodes", "2", "--head", "a", "--config", "no.yaml"], "--config 'no.yaml' does not exist"),
        (["--nodes", "2", "fast"], "'fast' is neither an option nor key=value"),
    ],
)
def test_wrong_options_end_before_anything_starts(arguments, message):
    refused = bash(NODES, *arguments)
    assert refused.returncode == 2 and message in refused.stderr


def test_a_wrong_key_ends_before_machines_wait_for_each_other():
    config = ROOT / "configs" / "toy" / "distill.yaml"
    given = ["--nodes=2", "--head=nowhere", f"--config={config}", f"--python={sys.executable}"]
    refused = bash(NODES, *given, "max_step=3")
    assert refused.returncode == 2 and "ConfigError: unknown key max_step" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.fixture
def python(tmp_path):
    """A python on a machine with two GPUs that shows what torchrun would be given, in place of starting it."""
    file = tmp_path / "python"
    cases = "*torch.distributed.run*) printf '%s\\n' \"$@\" ;; *device_count*) echo 2 ;;"
    file.write_text(f'#!/bin/sh\ncase "$*" in {cases} *) exec "{sys.executable}" "$@" ;; esac\n')
    file.chmod(0o755)
    return file


def test_torchrun_is_told_of_all_machines(python):
    """In its own words: they are read by its own parser."""
    from torch.distributed.run import get_args_parser

    config = ROOT / "configs" / "toy" / "distill.yaml"
    given = ["--nodes=2", "--head=a", "--id=b", f"--config={config}", f"--python={python}", "batch_size=16"]
    done = bash(NODES, *given)
    assert done.returncode == 0, done.stderr
    read = get_args_parser().parse_args(done.stdout.splitlines()[2:])
    assert (read.nnodes, read.nproc_per_node, read.rdzv_id) == ("2", "2", "b")
    assert (read.rdzv_backend, read.rdzv_endpoint, read.local_addr) == ("c10d", "a:29500", None)
    assert read.module and [read.training_script, *read.training_script_args] == [
        *("longtake", "train", str(config), "batch_size=16")
    ]
    here = get_args_parser().parse_args(bash(NODES, *given, "--head=127.0.0.1:1", "--gpus=0").stdout.splitlines()[2:])
    assert (here.nproc_per_node, here.rdzv_endpoint, here.local_addr) == ("1", "127.0.0.1:1", "127.0.0.1")
    refused = bash(NODES, *given, "--gpus", "99")
    assert refused.returncode == 2 and "--gpus 99: this machine has 2" in refused.stderr


def slurm(tmp_path, *arguments, **changes):
    """The batch script as SLURM runs it: a copy, with stand-ins for srun (which shows its words) and scontrol."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "srun": 'printf "%s\\n" "$@"',
        "scontrol": 'echo "$@" > "$0.asked"; printf "n7\\nn8\\n"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    copy = tmp_path / "slurm_script"
    copy.write_text(SBATCH.read_text())
    given = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "61234",
    }
    return bash(copy, *arguments, **given | changes)


def test_slurm_starts_one_launcher_a_node(tmp_path):
    config = "configs/wan/i2v_1_3b/distill.yaml"
    done = slurm(tmp_path, config, "batch_size=16", "data.path=a b")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bin" / "scontrol.asked").read_text() == "show hostnames n[7-8]\n"
    words = done.stdout.splitlines()
    assert words[:2] == ["--ntasks-per-node=1", "--kill-on-bad-exit=1"] and words[2:4] == ["bash", str(NODES)]
    given = dict(zip(words[4:14:2], words[5:14:2]))
    assert given == {
        "--nodes": "2",
        "--head": "n7:21234",
        "--id": "61234",
        "--grace": "270",
        "--config": config,
    }
    assert words[14:] == ["batch_size=16", "data.path=a b"]


def test_slurm_directives_are_known_and_say_what_the_head_says(tmp_path):
    text = SBATCH.read_text()
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.M)
    assert len(lines) == text.count("#SBATCH ") and text.index("#SBATCH") < text.index("set -euo")
    options = dict(lines)
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "time", "signal", "requeue"}
    assert options.keys() == known | {"open-mode", "output"}
    assert options["ntasks-per-node"] == "1" and options["signal"] == "TERM@300" and "Five minutes" in text
    refused = slurm(tmp_path, "no.yaml")
    assert refused.returncode == 2 and "must be a configuration file, got 'no.yaml'" in refused.stderr


def test_slurm_names_the_missing_repository(tmp_path):
    refused = slurm(tmp_path, str(ROOT / "configs/toy/distill.yaml"), SLURM_SUBMIT_DIR=str(tmp_path))
    assert refused.returncode == 2 and "call sbatch in the repository" in refused.stderr


# ---- two "nodes" ------------------------------------------------------------------------------------------------------
def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def nodes(file, folder, count=2, **changes):
    """The launchers of `count` nodes, each with a process on the CPU."""
    overrides = [f"{key}={value}" for key, value in changes.items()]
    head = f"127.0.0.1:{free_port()}"
    given = ["--nodes", str(count), "--head", head, "--config", str(file), "--gpus", "0", "--python", sys.executable]
    logs = [(folder / f"node{number}.log").open("w") for number in range(count)]
    return [
        subprocess.Popen(
            ["bash", str(NODES), *given, *overrides],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        for log in logs
    ]


def wait(launchers, folder, seconds=150):
    end = time.monotonic() + seconds
    try:
        return [launcher.wait(max(1, end - time.monotonic())) for launcher in launchers]
    except subprocess.TimeoutExpired:
        pytest.fail("".join(log.read_text()[-2000:] for log in folder.glob("node*.log")))
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)


@pytest.fixture
def stage(workshop, tmp_path):
    """File and tree of a tiny causal stage."""
    tree = stage_tree(workshop, tmp_path / "run", "causal", max_steps=2, save_every=0)
    file = tmp_path / "stage.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file, tree


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(stage, tmp_path):
    file, tree = stage
    assert wait(nodes(file, tmp_path), tmp_path) == [0, 0], (tmp_path / "node0.log").read_text()
    alone = StageConfig.from_tree({**tree, "logdir": str(tmp_path / "alone")})
    run_stage(alone, Mesh())
    two, one = (read_rows(folder / "causal" / "metrics.jsonl") for folder in (tmp_path / "run", tmp_path / "alone"))
    assert [row["step"] for row in two] == [0, 1]
    for a, b in zip(two, one, strict=True):
        assert a["generator_loss"] == pytest.approx(b["generator_loss"], rel=1e-4)


@pytest.mark.slow
def test_sigterm_on_one_node_saves_and_the_same_command_goes_on(stage, tmp_path):
    """What SLURM does before the limit, and the next job."""
    file, tree = stage
    launchers = nodes(file, tmp_path, max_steps=2000, save_every=1000)
    rows, end = tmp_path / "run" / "causal" / "metrics.jsonl", time.monotonic() + 100
    while not (rows.exists() and len(read_rows(rows)) > 2):
        assert time.monotonic() < end, (tmp_path / "node0.log").read_text()[-3000:]
        time.sleep(0.1)
    for launcher in launchers:
        launcher.terminate()
    assert all(code != 0 for code in wait(launchers, tmp_path))
    checkpoint = latest_checkpoint(tmp_path / "run" / "causal" / "checkpoints")
    assert checkpoint is not None
    saved = int(checkpoint.name.removeprefix("step_"))
    assert 2 < saved < 1000
    assert wait(nodes(file, tmp_path, max_steps=saved + 2, save_every=1000), tmp_path) == [0, 0]
    assert [row["step"] for row in read_rows(rows)] == list(range(saved + 2))
