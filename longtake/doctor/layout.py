"""How a stage lies over many GPUs: data ranks, shards, replicas, sequence groups, and where nodes end.

Neighbouring ranks are in one sequence group, sequence groups in one shard group, and replicas hold the same shards:
replica x shard group = all ranks. Must know no rates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from longtake.config import LoraConfig, StageConfig
from longtake.doctor.memory import Networks
from longtake.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """`gpus` ranks on nodes of `gpus_per_node`; `sequence` ranks share a video (Ulysses), `replicate` copies of the
    weights, each sharded over the rest, or `whole` weights on each rank. `shared_base`: all roles are one frozen
    network with low-rank updates. `cpu_offload`, `compile` and `gather_once`, as the stage's `parallel` says.
    """

    gpus: int
    gpus_per_node: int = 8
    sequence: int = 1
    replicate: int = 1
    shared_base: bool = False
    cpu_offload: bool = False
    compile: bool = False
    whole: bool = False
    gather_once: bool = True

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "sequence", "replicate"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{_option(name)} {value} must be at least 1")
        if self.whole and self.replicate > 1:
            raise ConfigError(
                f"--replicate {self.replicate} has no meaning where each rank keeps whole weights "
                "(parallel.weights=whole); leave it out, or set parallel.weights=sharded"
            )
        if self.gpus % (self.sequence * self.replicate):
            raise ConfigError(
                f"--gpus {self.gpus} must be a multiple of --sequence {self.sequence} x --replicate {self.replicate}"
            )

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that see samples of their own."""
        return self.gpus // self.sequence

    @property
    def shards(self) -> int:
        """Ranks over which one copy of the weights lies."""
        return 1 if self.whole else self.gpus // self.replicate

    @property
    def holds_whole(self) -> bool:
        """Whether each rank holds whole networks."""
        return self.whole or self.gpus == 1

    @property
    def copies(self) -> int:
        """How many copies of the weights there are."""
        return self.gpus // self.shards

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    def check(self, config: StageConfig, networks: Networks) -> None:
        """Raises ConfigError unless heads, batch and roles fit."""
        for network in networks.loaded:
            if network.num_heads % self.sequence:
                raise ConfigError(
                    f"--sequence {self.sequence} must divide the {network.num_heads} heads of each network; take one "
                    f"of {', '.join(map(str, divisors(heads(networks))))}"
                )
        if config.batch_size % self.data_ranks:
            below = config.batch_size // self.data_ranks * self.data_ranks
            batch = " or ".join(str(size) for size in (below, below + self.data_ranks) if size)
            raise ConfigError(
                f"batch_size={config.batch_size} must be a multiple of the {self.data_ranks} data ranks (--gpus "
                f"{self.gpus} / --sequence {self.sequence}); set batch_size to {batch}, or raise --sequence"
            )
        if self.shared_base and len(set(networks.loaded)) > 1:
            raise ConfigError("--shared-base needs networks of one size in all roles; leave it out")


def layout_of(config: StageConfig, gpus: int, **given: Any) -> Layout:
    """The layout of a stage on `gpus` ranks. Options that are given win over the stage's own values.

    Raises: ConfigError when the numbers do not divide each other.
    """
    found: dict[str, Any] = {}
    # Read by name: stages from before these groups existed have neither.
    parallel = getattr(config, "parallel", None)
    found["whole"] = getattr(parallel, "weights", None) == "whole"
    for name in ("replicate", "sequence", "compile"):
        if (value := getattr(parallel, name, None)) is not None:
            found[name] = value
    found["gather_once"] = getattr(config, "gathers_once", True)
    found["shared_base"] = getattr(config, "roles", None) == "shared"
    return Layout(gpus, **found | {name: value for name, value in given.items() if value is not None})


def with_shared_base(config: StageConfig) -> StageConfig:
    """The stage with low-rank updates for student and critic: those that it names, else the defaults."""
    assert config.critic is not None
    lora = config.lora or LoraConfig()
    critic = config.critic.model_copy(update={"lora": config.critic.lora or lora})
    return config.model_copy(update={"lora": lora, "critic": critic})


def heads(networks: Networks) -> int:
    """The number that `sequence` must divide."""
    return gcd(*(network.num_heads for network in networks.loaded))


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [k for k in range(1, number + 1) if number % k == 0]


def candidates(config: StageConfig, networks: Networks, layout: Layout) -> Iterable[tuple[Layout, StageConfig]]:
    """Every mesh for the ranks of `layout`, with the smallest batch from the stage's own on that it can share out.

    Sequence groups stay inside a node; a shard group is some sequence groups inside a node, or whole nodes, or each
    rank has whole weights.
    """
    node = min(layout.gpus, layout.gpus_per_node)
    for sequence in divisors(gcd(heads(networks), node)):
        for shards in divisors(layout.gpus):
            whole = shards % node == 0 if shards > node else node % shards == 0
            alone = shards == 1 and not layout.cpu_offload
            if not alone and (shards % sequence or not whole):
                continue
            replicas = 1 if alone else layout.gpus // shards
            one = replace(layout, whole=alone, replicate=replicas, sequence=sequence)
            ranks = one.data_ranks
            batch = -(-config.batch_size // ranks) * ranks
            share = batch // ranks
            micro = gcd(config.micro_batch_size, share)
            yield one, config.model_copy(update={"batch_size": batch, "micro_batch_size": micro})


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
