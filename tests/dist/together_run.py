"""Two ranks that fail together, after their last collective, and last where the other one waits."""

import sys
import time

import torch
import torch.distributed as dist

from longtake.errors import ConfigError, TrainingError
from longtake.parallel.mesh import init_mesh
from longtake.parallel.together import RanksApart, Together


def said(mesh, work):
    try:
        return f"{together.every(work)}"
    except (ConfigError, TrainingError) as error:
        return f"{type(error).__name__}: {error}"


def both():
    raise ConfigError("both")


def after():
    dist.all_reduce(torch.ones(1))
    if mesh.rank == 1:
        raise torch.OutOfMemoryError("after")


def between():
    dist.all_reduce(torch.ones(1))
    if mesh.rank == 1:
        raise torch.OutOfMemoryError("between")
    dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    with init_mesh("cpu", timeout_minutes=10) as mesh:
        together = Together(mesh, grace_seconds=2.0)
        print(f"rank {mesh.rank}: {said(mesh, lambda: mesh.rank)}; {said(mesh, both)}", flush=True)
        try:
            together.every(after)
        except (TrainingError, torch.OutOfMemoryError) as error:
            print(f"rank {mesh.rank}: {type(error).__name__} {error}", flush=True)
        print(f"rank {mesh.rank}: {said(mesh, lambda: 7)}", flush=True)
        start = time.monotonic()
        try:
            together.every(between)
        except RanksApart as error:
            print(f"rank {mesh.rank}: after {time.monotonic() - start:.0f} s: {error}", flush=True)
            sys.exit(3)
