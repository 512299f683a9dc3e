"""Everything that a resumed run needs and a fresh run does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from longtake.config.groups import EmaConfig, OptimConfig
from longtake.models.lora import factors
from longtake.train.ema import EMA
from longtake.train.optim import NetworkOptimizer
from longtake.weights.lora import Adapter
from longtake.weights.names import clean_name


@dataclass
class TrainState:
    """The state of a training run.

    Fields: `networks` that are trained, their `optimizers` and averages (`ema`, for some of them) by name; `step`,
    the number of completed iterations; `data_position`, the number of samples taken by all ranks; `skipped`, how many
    updates were left out because a loss or gradient was not finite; `seed` of all randomness (there is no generator
    state: every draw is a function of seed, step, purpose and sample index); `adapters` of the networks of which only
    low-rank updates are trained: their other weights are no part of the state.
    """

    networks: dict[str, nn.Module]
    optimizers: dict[str, NetworkOptimizer]
    ema: dict[str, EMA] = field(default_factory=dict)
    seed: int = 0
    step: int = 0
    data_position: int = 0
    skipped: int = 0
    adapters: dict[str, Adapter] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, OptimConfig],
        ema: Mapping[str, EmaConfig] | None = None,
        *,
        max_steps: int,
        seed: int = 0,
        adapters: Mapping[str, Adapter] | None = None,
    ) -> TrainState:
        """The state before the first iteration, of networks that are already sharded.

        Args: a group of values for each network's optimizer, and for the averages that are kept; `max_steps`, the
        iterations of the run.
        """
        return cls(
            networks=dict(networks),
            optimizers={name: NetworkOptimizer(networks[name], group, max_steps) for name, group in optimizers.items()},
            ema={name: EMA(networks[name], group) for name, group in (ema or {}).items()},
            seed=seed,
            adapters=dict(adapters or {}),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name; writing into them restores the state."""
        named: dict[str, Tensor] = {}
        for name, network in self.networks.items():
            own = factors(network.state_dict()) if name in self.adapters else network.state_dict()
            named |= {f"networks.{name}.{clean_name(key)}": value for key, value in own.items()}
        for name, optimizer in self.optimizers.items():
            named |= {f"optimizers.{name}.{key}": value for key, value in optimizer.tensors().items()}
        for name, average in self.ema.items():
            named |= {f"ema.{name}.{key}": value for key, value in average.tensors().items()}
        return named
