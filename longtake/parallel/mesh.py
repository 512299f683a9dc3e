"""The ranks of a run: start-up from torchrun's environment, and the few collectives that training needs.

Without torchrun (or with one process) there is no process group and every helper is the identity, so that nothing
outside this file asks whether it is distributed. This file must know no model and no training.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longtake.config.groups import ParallelConfig
from longtake.devices import usable_device
from longtake.errors import ConfigError, LongtakeError, TrainingError
from longtake.parallel.ulysses import Ulysses
from longtake.rollout.cuda_graphs import forget_all

T = TypeVar("T")

LAST_COLLECTIVE_SECONDS = 0.2


@dataclass(frozen=True)
class Mesh:
    """One process among `world_size`; a context manager that leaves the process group on a clean exit.

    Fields: `rank`, `world_size`, the `device` of this process; `device_mesh` over all ranks, or None for a single
    process: `[shard]` as it starts, `[replicate, shard, sequence]` after `arranged`; `fsdp_mesh`, what parameters are
    sharded over; `whole_weights`: each rank holds whole parameters though there are several; `sequence`, the ranks that
    compute each model call together with this one, or None; `group` that `every` talks over, None for the one of all
    ranks.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    device_mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None
    parameter_mesh: DeviceMesh | None = None
    sequence: Ulysses | None = None
    whole_weights: bool = False

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        forget_all()  # recorded passes hold the group that is left here
        # After an error the other ranks may sit in another collective: leaving the group could wait for them for ever.
        if kind is None and self.is_distributed:
            # On a busy machine ranks were seen to abort as Python ended right after a collective of gloo (torch 2.13);
            # probably its threads still held tensors, for which there is nothing to wait.
            time.sleep(LAST_COLLECTIVE_SECONDS)
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.device_mesh is not None

    @property
    def fsdp_mesh(self) -> DeviceMesh | None:
        """The mesh of `fully_shard`, None where nothing is sharded: `[shard]`, or `[replicate, shard]` where parameters
        are kept in several sharded copies. Ranks of one sequence group have shards of their own.
        """
        if self.whole_weights:
            return None
        return self.device_mesh if self.parameter_mesh is None else self.parameter_mesh

    @property
    def num_data_ranks(self) -> int:
        """Among how many groups of ranks a batch is divided: the ranks of a sequence group get the same samples."""
        return self.world_size if self.sequence is None else self.world_size // self.sequence.size

    @property
    def data_rank(self) -> int:
        """The number of this rank's group among them."""
        return self.rank if self.sequence is None else self.rank // self.sequence.size

    @property
    def leads_sequence(self) -> bool:
        """Whether this rank speaks for its sequence group, whose ranks all have the same results."""
        return self.sequence is None or self.sequence.leads

    def arranged(self, parallel: ParallelConfig) -> Mesh:
        """The same ranks as a mesh replicate x shard x sequence, the ranks of a sequence group being neighbours.

        All ranks call it. Raises: ConfigError when the ranks cannot be divided so.
        """
        shard, whole = parallel.shard(self.world_size), parallel.data_parallel == "ddp"
        if self.device_mesh is None:
            return self
        if parallel.replicate == parallel.sequence == 1:
            return replace(self, whole_weights=whole)
        kind, shape = self.device.type, (parallel.replicate, shard, parallel.sequence)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard", "sequence"))
        if parallel.sequence == 1:
            return replace(self, device_mesh=mesh, parameter_mesh=mesh["replicate", "shard"])
        sequence = Ulysses(mesh["sequence"])
        if whole:
            return replace(self, device_mesh=mesh, sequence=sequence, whole_weights=True)
        # Made anew rather than by flattening axes of `mesh`, for which torch has no public way.
        sizes, names = (parallel.replicate, shard * parallel.sequence), ("replicate", "shard")
        first = 0 if parallel.replicate > 1 else 1
        parameters = init_device_mesh(kind, sizes[first:], mesh_dim_names=names[first:])
        return replace(self, device_mesh=mesh, parameter_mesh=parameters, sequence=sequence)

    def every(self, work: Callable[[], T]) -> list[T]:
        """What `work` returned on each rank, known to all of them.

        Raises: on every rank, as soon as `work` failed on one (the error of the lowest such rank; errors that are not
        ours become a TrainingError on the other ranks), so that no rank goes on alone.
        """
        if not self.is_distributed:
            return [work()]
        value, error = None, None
        try:
            value = work()
        except Exception as caught:  # noqa: BLE001 (raised again below, on every rank)
            error = caught
        text = error if isinstance(error, LongtakeError) else f"{type(error).__name__}: {error}"
        outcomes: list[Any] = [None] * self.world_size
        dist.all_gather_object(outcomes, (value, text if error is not None else None), group=self.group)
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(outcomes):
            if isinstance(failure, LongtakeError):
                raise failure
            if failure is not None:
                raise TrainingError(f"rank {rank} failed with {failure}; see its traceback")
        return [value for value, _ in outcomes]

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returned on rank 0, the only rank that runs it. Raises: its error, on every rank."""
        return self.every(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]

    def beside(self) -> Mesh:
        """The same ranks with a gloo group of their own, for `every` and `on_main` in a thread beside the training.

        All ranks call it; `leave_group` when the thread has ended.
        """
        if not self.is_distributed:
            return self
        # Ranks may wait long for one that writes: whoever waits for the thread has a time-out of its own.
        return replace(self, group=dist.new_group(backend="gloo", timeout=timedelta(days=1)))

    def leave_group(self) -> None:
        """Gives the group of `beside` back."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def store(self, name: str) -> dist.Store | None:
        """A new connection to the key-value store of the run, under a prefix of this start; None for one rank."""
        if not self.is_distributed:
            return None
        return dist.PrefixStore(f"longtake/{name}", _store_of_this_start())

    def gather(self, values: Sequence[float]) -> torch.Tensor:
        """The equally many `values` of each rank: float64 [world_size, n] on the CPU."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        if not self.is_distributed:
            return mine[None].cpu()
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(rows, mine)
        return torch.stack(rows).cpu()


def let_segments_grow() -> None:
    """Has torch's allocator, before it is first used in this process, let its pieces of a GPU's memory grow: those of
    fixed sizes strand gigabytes where recomputation and roll-outs take turns. What the environment says stays.
    """
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def init_mesh(device: str | None = None, *, timeout_minutes: float = 30.0, one_too: bool = False) -> Mesh:
    """The mesh of this process, from torchrun's RANK, WORLD_SIZE and LOCAL_RANK; one process without them.

    Args: `device` "cpu" or "cuda" (default: CUDA where present), for one process also "cuda:1"; a collective fails
    after `timeout_minutes`; `one_too`, whether torchrun's only rank is a group as well, over which weights are sharded:
    it measures what sharding costs but for the transfer.
    Raises: ConfigError when CUDA is asked for and missing, or has fewer devices than local ranks.
    """
    rank, world_size, local_rank = launched()
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if world_size == 1:
        chosen = usable_device(device)
    elif kind not in ("cpu", "cuda"):
        raise ConfigError(
            f"device={kind!r} must be cpu or cuda where there are several ranks, of which each has its own"
        )
    elif kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} needs a CUDA device and {torch.cuda.device_count()} are visible; "
            "start at most that many processes, or set device=cpu"
        )
    else:
        chosen = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    if chosen.type == "cuda":
        chosen = torch.device("cuda", chosen.index or 0)
        torch.cuda.set_device(chosen)
    if world_size == 1 and not (one_too and "MASTER_ADDR" in os.environ):
        return Mesh(device=chosen)
    _die_with_launcher()
    # Recorded exchanges hang where NCCL registers their buffers at that time and the allocator's segments can grow
    # (pytorch/pytorch 158029, pytorch/torchtitan 3306; seen on two H200).
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    # gloo beside nccl: objects and CPU tensors (errors, checkpoint plans) travel without touching the GPU.
    # torchrun keeps its store from restart to restart, with the addresses of dead ranks: each start has its own part.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    given: dict[str, Any] = {"store": _store_of_this_start(), "rank": rank, "world_size": world_size} if agent else {}
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
        device_id=chosen if kind == "cuda" else None,
        **given,
    )
    return Mesh(rank, world_size, chosen, init_device_mesh(kind, (world_size,), mesh_dim_names=("shard",)))


def launched() -> tuple[int, int, int]:
    """Rank, world size and local rank of this process, as torchrun says them (0, 1, 0). Raises: ConfigError."""
    found = {}
    for name, least, default in (("WORLD_SIZE", 1, 1), ("RANK", 0, 0), ("LOCAL_RANK", 0, 0)):
        text = os.environ.get(name, str(default))
        if not (text.isdecimal() and len(text) < 7 and int(text) >= least):
            raise ConfigError(
                f"{name}={text!r} in the environment must be a whole number, {least} or more; unset it, or start with "
                "torchrun, which sets it"
            )
        found[name] = int(text)
    if found["RANK"] >= found["WORLD_SIZE"]:
        raise ConfigError(f"RANK={found['RANK']} must be below WORLD_SIZE={found['WORLD_SIZE']}; start with torchrun")
    if found["WORLD_SIZE"] > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ConfigError(
                    f"WORLD_SIZE={found['WORLD_SIZE']} needs {name}; start with torchrun, which sets both, or unset it"
                )
        if not os.environ["MASTER_PORT"].isdecimal() or not 0 < int(os.environ["MASTER_PORT"]) < 1 << 16:
            raise ConfigError(f"MASTER_PORT={os.environ['MASTER_PORT']!r} must be a port number; start with torchrun")
    return found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]


def _store_of_this_start() -> dist.Store:
    """A new connection to the key-value store of the run, to the part of it that belongs to this start of the ranks."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(minutes=5))
    return dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def restarts() -> tuple[int, int]:
    """How often torchrun started this process anew after a rank had failed, and how often it may; (0, 0) without it."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def _die_with_launcher() -> None:
    """Ends this process when the launcher is killed: torchrun's workers live in sessions of their own and would go on
    writing checkpoints beside those of a restarted run. Linux only; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    pr_set_pdeathsig = 1  # from linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))
