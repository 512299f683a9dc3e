"""Seconds and network bytes of a step on many GPUs, from counted work and the constants of `rates.py`.

Computing: each call of a network (`rollout/work.py`) takes the seconds of its matrix products, of its attention and of
the bytes that its element-wise operations move, or those that the host needs to start them, whichever are more. Bytes a
token and layer were counted from the operations of the model as eager PyTorch runs them (a test counts again):

    under bfloat16 autocast  254 D + 4 M forward, 612 D + 8 M backward; without autocast 182 D + 8 M and 566 D + 16 M
    each attended token of a cache  relative positions 34 D forward, 38 D and 26 D graded; absolute 12 D, 16 D and 0
    low-rank updates of all layers under bfloat16  58 D + 10 M more forward, 8 M - 84 D more backward
    and 6.3 bytes a weight and call for the bfloat16 copies of float32 weights

Calls of a whole clip, or of all blocks together, and calls of a block against a cache have a measured factor each
(`slowdown`, `slowdown_blocks`).

Networks: FSDP gathers each block's weights in every forward (a student's once for a whole roll-out where
`parallel.gather_once` is on) and once more in every backward, where gradients are also reduced over a shard group and
then over the replicas. Gathering hides behind a share of the computing. Whole weights on each rank need no gathers, and
their gradients are reduced once an update, behind nothing. Ulysses exchanges queries, keys, values and the result of
every self-attention; that does not hide. A ring over nodes uses the network cards of all its GPUs, so its rate is the
smaller one of a GPU's links and of all cards of a node.

Not modelled: waiting for data, encoders, logging, checkpoints, stragglers, and ranks that draw unequal shapes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import astuple, dataclass, field

from longtake.config import StageConfig
from longtake.doctor.layout import Layout
from longtake.doctor.memory import Networks, autocast_bytes, trained_count, weight_bytes
from longtake.doctor.need import without_mesh
from longtake.doctor.rates import Rates
from longtake.models.dit import DiTConfig
from longtake.models.flops import KERNEL_BACKWARD, Call, Work, backward, forward, recomputed
from longtake.rollout.work import CRITIC, GENERATOR, TEACHER, Pass, loras, model_work, passes

# Phases of `Prediction.seconds`, in the order they are printed.
PHASES = ("rollout", "scores", "forward", "backward", "optimizer", "gathers", "exchange")


@dataclass(frozen=True)
class Traffic:
    """Bytes a token of width D and MLP width M that element-wise operations of one layer move, and calls they are."""

    width: float
    hidden: float
    past: float
    calls: float

    def __add__(self, other: Traffic) -> Traffic:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Traffic(*(one + more for one, more in pairs))

    def bytes(self, network: DiTConfig, tokens: float, past_tokens: float) -> float:
        """Of one layer."""
        return tokens * (self.width * network.dim + self.hidden * network.ffn_dim) + past_tokens * self.past * (
            network.dim
        )


# For each precision; True for the backward.
TRAFFIC = {
    ("bf16", False): Traffic(254, 4, 34, 91),
    ("bf16", True): Traffic(612, 8, 26, 172),
    ("fp32", False): Traffic(182, 8, 34, 50),
    ("fp32", True): Traffic(566, 16, 26, 128),
}
LOW_RANK = {False: Traffic(58, 10, 0, 34), True: Traffic(-84, 8, 0, 1)}
ABSOLUTE_PAST = {False: 12.0, True: 0.0}
COPY_BYTES = 6.3


@dataclass(frozen=True)
class Prediction:
    """One step (iteration), the mean over those with and without an update of the student.

    Fields: `seconds` by phase; `node_bytes` and `network_bytes` that each GPU sends inside and between nodes;
    `model_flops` of one GPU; `samples`, the batch of all.
    """

    seconds: dict[str, float]
    node_bytes: float
    network_bytes: float
    model_flops: float
    samples: int
    peak: float

    @property
    def total(self) -> float:
        """Seconds a step."""
        return sum(self.seconds.values())

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.total

    @property
    def utilisation(self) -> float:
        """Model operations over what the device's peak allows."""
        return self.model_flops / self.total / self.peak

    def tree(self) -> dict[str, object]:
        """Plain values."""
        return {
            "seconds": self.total,
            "seconds_by_phase": dict(self.seconds),
            "node_bytes": self.node_bytes,
            "network_bytes": self.network_bytes,
            "model_flops": self.model_flops,
            "mfu": self.utilisation,
            "samples_per_second": self.samples_per_second,
        }


@dataclass
class _Sums:
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    node_bytes: float = 0.0
    network_bytes: float = 0.0


class SpeedModel:
    """Predicts a stage. Args: `image_tokens` of the CLIP branch, where a network has one."""

    def __init__(
        self, config: StageConfig, networks: Networks, layout: Layout, rates: Rates, image_tokens: int
    ) -> None:
        self.config, self.layout, self.rates, self.image_tokens = without_mesh(config), layout, rates, image_tokens
        found = {GENERATOR: networks.generator, CRITIC: networks.critic, TEACHER: networks.teacher}
        self.networks = {name: network for name, network in found.items() if network is not None}
        self.loras = loras(config)
        self.bf16 = config.precision == "bf16"
        names = self.networks.items()
        self._trained = {name: trained_count(network, self.loras[name]) for name, network in names}
        self._stored = {name: self._stored_bytes(name) for name in self.networks}
        self._unrolled = 1.0  # calls of a roll-out
        self._copied = {name: autocast_bytes(network) for name, network in names}

    # ---- a step -----------------------------------------------------------------------------------------------------
    def predict(self) -> Prediction:
        """The mean step; of long tuning that of a later chunk."""
        config, every = self.config, 1
        if config.distils:
            assert config.critic is not None
            every = config.critic.updates_per_generator
        kinds = [(True, 1 / every), (False, 1 - 1 / every)] if every > 1 else [(True, 1.0)]
        sums, flops = _Sums(), 0.0
        count = config.accumulation(self.layout.data_ranks)
        for update, share in kinds:
            found = self.passes(update)
            self._unrolled = max(1.0, sum(each.times for each in found if each.phase == "rollout" and each.ahead))
            for each in found:
                self.add(each, share * count, sums)
            work = model_work(found, self.networks, self.loras)
            flops += share * count * sum(one.total for one in work.values()) / self.layout.sequence
        names = [CRITIC] if config.distils else [GENERATOR]
        for name, share in [*((name, 1.0) for name in names), *([(GENERATOR, 1 / every)] if config.distils else [])]:
            self._optimizer(name, share, sums)
            if self.layout.whole:  # once an update, behind nothing
                sums.seconds["gathers"] += share * self._reduce(4.0 * self._trained[name], sums, share)
        peak = self.rates.device.peak(config.precision)
        seconds = {name: sums.seconds[name] for name in PHASES if name in sums.seconds}
        return Prediction(seconds, sums.node_bytes, sums.network_bytes, flops, config.batch_size, peak)

    def passes(self, update_generator: bool, exit_step: float | None = None) -> list[Pass]:
        """The calls of one micro-batch."""
        return passes(
            self.config,
            self.networks,
            self.config.micro_batch(self.layout.data_ranks),
            self.image_tokens,
            update_generator=update_generator,
            exit_step=exit_step,
            chunk=1 if self.config.stage == "long" else 0,
            together=self.config.joins_exits(whole=self.layout.holds_whole, sequence=self.layout.sequence),
        )

    def add(self, each: Pass, times: float, sums: _Sums) -> None:
        """One kind of call with its backward, `times` as often as it says."""
        times *= each.times
        network, exchanges = self.networks[each.network], 1.0 if each.ahead else 0.0
        weights = self._stored[each.network]
        computed = self.forward_seconds(each) if each.ahead else 0.0
        gathers = times if each.ahead else 0.0
        if each.ahead and each.phase == "rollout" and self.layout.gather_once:
            gathers = times / self._unrolled
        moved = self._gather(weights, sums, gathers)
        sums.seconds[each.phase] += times * computed
        sums.seconds["gathers"] += gathers * self._exposed(moved, computed)
        if each.graded:
            computed = self.backward_seconds(each)
            reduced = 0.0
            if not self.layout.whole:
                reduced = self._reduce(4.0 * self._trained[each.network], sums, times)
            moved = self._gather(weights, sums, times) + reduced
            sums.seconds["backward"] += times * computed
            sums.seconds["gathers"] += times * self._exposed(moved, computed)
            exchanges += 2.0 if self._recomputes(each) else 1.0
        sums.seconds["exchange"] += times * exchanges * self._exchange(network, each.call, sums, times * exchanges)

    # ---- computing --------------------------------------------------------------------------------------------------
    def forward_seconds(self, each: Pass) -> float:
        """Of one call."""
        network, lora = self.networks[each.network], self.loras[each.network]
        return self._compute(network, each, forward(network, each.call, lora), backwards=False)

    def backward_seconds(self, each: Pass) -> float:
        """Of one call's backward, with what activation checkpointing computes again."""
        network, lora = self.networks[each.network], self.loras[each.network]
        seconds = self._compute(network, each, backward(network, each.call, lora), backwards=True)
        if self._recomputes(each):
            seconds += self._compute(network, each, recomputed(network, each.call, lora), backwards=False)
        return seconds

    def _recomputes(self, each: Pass) -> bool:
        return bool(self.config.activation_checkpointing) or not each.ahead

    def _compute(self, network: DiTConfig, each: Pass, work: Work, *, backwards: bool) -> float:
        rates, call, share = self.rates, each.call, self.layout.sequence
        lora = self.loras[each.network]
        if self.bf16:
            kind = "attention_block" if each.phase == "rollout" else "attention_long"
            masked = each.phase == "forward" and self.config.stage != "teacher"  # teacher forcing, in any stage
            if masked:
                kind = "attention_masked"
            back = rates["attention_masked" if masked else "attention_backward"]
            products, attend = rates["products"], rates[kind]
        else:
            products = attend = back = rates.device.fp32 * rates["float32_share"]
        seconds = work.products / products + work.attention / attend
        seconds += KERNEL_BACKWARD * work.attention_backward / back
        traffic = TRAFFIC["bf16" if self.bf16 else "fp32", backwards]
        past = self._past_tokens(call)
        if self.config.rope == "absolute":
            traffic = Traffic(traffic.width, traffic.hidden, ABSOLUTE_PAST[backwards], traffic.calls)
        if lora is not None and self.bf16:
            traffic = traffic + LOW_RANK[backwards]
        left = rates["compiled_bytes"] if self.layout.compile else 1.0
        moved = left * network.num_layers * traffic.bytes(network, call.all_tokens, past)
        copies = COPY_BYTES / 2 * self._copied[each.network] if self.bf16 and lora is None else 0.0
        device = (seconds + moved / rates["memory"]) / share + copies / rates["memory"]
        host = left * network.num_layers * traffic.calls * rates["call"]
        of_block = each.phase == "rollout" and each.ahead
        return rates["slowdown_blocks" if of_block else "slowdown"] * max(device, host)

    def _past_tokens(self, call: Call) -> float:
        """Attended tokens of a cache."""
        return call.past * call.tokens * call.batch if self.config.distils else 0.0

    def _optimizer(self, name: str, times: float, sums: _Sums) -> None:
        trained = self._trained[name] / self.layout.shards
        moved = self.rates["optimizer_bytes"]
        if name == GENERATOR and self.config.ema.enabled:
            moved += 12  # the average is read and written, the weights are read
        rate = self.rates["memory"]
        if self.layout.cpu_offload:
            # Gradients go out, weights come back; the time of the host's own update is not known.
            moved, rate = 8, self.rates["host_link"]
        sums.seconds["optimizer"] += times * trained * moved / rate

    # ---- networks -------------------------------------------------------------------------------------------------
    def _stored_bytes(self, name: str) -> float:
        """Bytes of a network as its shards are gathered."""
        network, lora, precision = self.networks[name], self.loras[name], self.config.precision
        updates = 0.0 if lora is None else (2.0 if self.bf16 else 4.0) * self._trained[name]
        return weight_bytes(self.networks[GENERATOR] if self.layout.shared_base else network, precision) + updates

    def _exposed(self, moved: float, computed: float) -> float:
        return moved - min(moved, self.rates["overlap"] * computed)

    def _gather(self, size: float, sums: _Sums, times: float) -> float:
        """Seconds to gather all weights of a network once, unit by unit; counts the bytes."""
        return self._ring(size, self.layout.shards, 1, sums, times)

    def _reduce(self, size: float, sums: _Sums, times: float) -> float:
        """Gradients: over the shards, then what each rank has of them over the replicas, there and back."""
        layout = self.layout
        seconds = self._ring(size, layout.shards, 1, sums, times)
        for _ in ("there", "back"):
            seconds += self._ring(size / layout.shards, layout.copies, layout.shards, sums, times)
        return seconds

    def _ring(self, size: float, ranks: int, stride: int, sums: _Sums, times: float) -> float:
        """Seconds of a ring over `ranks` that are `stride` apart; each sends `size` (ranks - 1) / ranks."""
        if ranks == 1:
            return 0.0
        sent, node = size * (ranks - 1) / ranks, self.layout.gpus_per_node
        units = max(network.num_layers for network in self.networks.values()) + 1
        if ranks * stride <= node:
            sums.node_bytes += times * sent
            return sent / self.rates["link"] + units * (ranks - 1) * self.rates["hop_node"]
        inside = max(1, min(ranks, node // stride))  # members of the ring on one node, each with its own card
        sums.network_bytes += times * sent / inside
        sums.node_bytes += times * sent * (1 - 1 / inside)
        rate = min(self.rates["link"], inside * self.rates["network"]) if inside > 1 else self.rates["network"]
        return sent / rate + units * (ranks - 1) * self.rates["hop_network"]

    def _exchange(self, network: DiTConfig, call: Call, sums: _Sums, times: float) -> float:
        """Seconds of the all-to-alls around the self-attentions of one call; counts the bytes."""
        sequence = self.layout.sequence
        if sequence == 1:
            return 0.0
        numbers = 4 * call.all_tokens / sequence * network.dim * network.num_layers
        sent = numbers * (2 if self.bf16 else 4) * (sequence - 1) / sequence
        inside = sequence <= self.layout.gpus_per_node
        if inside:
            sums.node_bytes += times * sent
        else:
            sums.network_bytes += times * sent
        hop = 4 * network.num_layers * self.rates["hop_node" if inside else "hop_network"]
        return sent / self.rates["link" if inside else "network"] + hop
