"""The networks of a stage and its objective: networks are opened, made fit, sharded, and only then filled; each is one
of its own, or a shared base with updates.

No rank holds a network whole (`parallel/materialize.py`); random first weights are the exception.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.checkpoint.invariants import completed, invariants
from longtake.config.stage import StageConfig
from longtake.errors import ConfigError
from longtake.models.dit import VideoDiT
from longtake.models.execution import Execution
from longtake.models.lora import DEFAULT, WRITER, base_name
from longtake.models.recompute import ByBlock
from longtake.models.sequence_parallel import check_heads
from longtake.models.shared_base import AdapterSwitch, AdapterView, SharedBase, WriterApart
from longtake.models.sizes import DiTConfig
from longtake.objectives.base import Objective, Parts, Phase
from longtake.parallel.fsdp import gathered, parallelize
from longtake.parallel.materialize import materialize
from longtake.parallel.mesh import Mesh
from longtake.rng import KeyedRNG
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser
from longtake.rollout.long_video import PictureCodec
from longtake.rollout.recorded_calls import RecordedCalls
from longtake.rollout.rounded import Rounded
from longtake.run_folder import holds_student, read_manifest
from longtake.train.adapters import adapt, earlier_values, first_values, reference_of
from longtake.train.execution import check_precision, quick, recomputed
from longtake.train.keeping import Keeper, Watched, keeps_some
from longtake.train.row_validation import Teacher
from longtake.train.state import TrainState
from longtake.weights.fingerprint import check_base, weights_identity
from longtake.weights.load import Opened
from longtake.weights.locate import find_weights
from longtake.weights.lora import Adapter, Base, is_adapter, read_base
from longtake.weights.presets import model_config
from longtake.weights.students import find_student, is_causal, open_source, weights_folder
from longtake.weights.tensor_files import not_finite
from longtake.weights.two_networks import Part, updates_of, writer_updates
from longtake.weights.widen import check_condition, opened_as_asked

logger = logging.getLogger(__name__)


class Networks(NamedTuple):
    """The trained and the frozen networks by name, the low-rank updates of those that train nothing else, and the
    generator as it streams.
    """

    trained: dict[str, VideoDiT]
    frozen: dict[str, VideoDiT]
    adapters: dict[str, Adapter]
    student: Denoiser


def _fill(opened: Opened, device: torch.device | str, values: Iterator[tuple[str, Tensor]], mesh: Mesh) -> None:
    """Puts the weights in place; all ranks call it. Raises: CheckpointError on every rank when one reads nan or inf."""
    sizes = {base_name(name): p.numel() * p.element_size() for name, p in opened.model.named_parameters()}
    found = materialize(opened.model, device, opened.told(values, sizes, device))
    if wrong := sorted({name for names in mesh.every(lambda: found) for name in names}):
        raise not_finite(opened.place(wrong[0]))


@dataclass
class Builder:
    """Builds the networks of one stage one after the other, and what trains them; remembers their updates, the
    networks whose memory decides what backward computes again, and what records the calls of all that are small.
    """

    config: StageConfig
    mesh: Mesh
    adapters: dict[str, Adapter] = field(default_factory=dict)
    watched: list[Watched] = field(default_factory=list)
    calls: RecordedCalls = field(default_factory=RecordedCalls)

    def __post_init__(self) -> None:
        if self.mesh.device.type != "cuda":
            self.config = self.config.without_a_gpu()

    def build(self) -> Networks:
        """All networks of the stage.

        Raises: CheckpointError, ConfigError when weights are missing, or fit neither each other nor the stage.
        """
        self.check_start()
        check_precision(self.config.networks, self.config.precision, self.mesh)
        trained: dict[str, VideoDiT] = {}
        frozen: dict[str, VideoDiT] = {}
        if self.base is not None:
            trained, frozen = self.shared(self.base)
        elif self.config.objective.writes_apart:
            trained["generator"] = self.with_writer()
        for name, wanted in self.config.networks.items():
            if wanted.optim is None and name not in frozen:
                frozen[name] = self.frozen(name)
            elif wanted.optim is not None and name not in trained:
                trained[name] = self.trained(name)
        trained = {name: trained[name] for name in self.config.networks if name in trained}
        return Networks(trained, frozen, self.adapters, self.student(trained["generator"]))

    def objective(
        self, networks: Networks, codec: PictureCodec | None, phase: Phase, draws: KeyedRNG | None = None
    ) -> Objective:
        """What the stage trains its networks by. Args: `codec`, where the objective decodes."""
        model = self.config.model
        parts = Parts(
            student=networks.student,
            trained=networks.trained,
            frozen=networks.frozen,
            draws=draws or KeyedRNG(self.config.seed, ahead=self.mesh.device.type == "cuda"),
            plan=self.config.stream_plan,
            shift=self.config.flow.shift,
            num_frames=self.config.video.num_latent_frames,
            given=int(model.image_condition == "i2v"),
            first_frame_clean=model.image_condition == "i2v" and model.first_frame_sigma == "zero",
            codec=codec,
            sharded=self.mesh.fsdp_mesh is not None,
            phase=phase,
        )
        return self.config.objective.build(parts)

    def state(self, objective: Objective) -> TrainState:
        """The state of the stage before its first iteration, of networks that are already sharded."""
        config = self.config
        optimizers = {name: wanted.optim for name, wanted in config.networks.items() if wanted.optim is not None}
        averages = {"generator": config.ema} if config.ema.enabled else {}
        return TrainState.build(
            objective.networks,
            optimizers,
            averages,
            max_steps=config.max_steps,
            seed=config.seed,
            adapters=self.adapters,
        )

    def keeper(self, objective: Objective) -> Keeper:
        """What decides how much of forwards is kept, from iterations of all updates; make it before the first one."""

        def shown(step: int) -> list[str]:
            # Of videos that go on, the beginning needs less memory than the rest.
            return [] if self.config.objective.decodes and objective.chunk(step) == 0 else objective.turns(step)

        micro_batches = self.config.accumulation(self.mesh.world_size)
        return Keeper(self.watched, self.mesh, list(objective.networks), shown, micro_batches)

    def reference(self, networks: Networks) -> VideoDiT | None:
        """The bidirectional weights beside which the student is measured, None where the objective has none, or where
        longer videos are measured than they make; they are read once more where the stage trains them.
        """
        name, frames = self.config.objective.reference, self.config.video.num_latent_frames
        if name is None or self.config.validation.num_latent_frames not in (None, frames):
            return None
        if name in networks.frozen and not self.config.networks[name].fp8:
            return networks.frozen[name]
        opened = self.open(self.weights(name))
        _fill(opened, self.mesh.device, opened.read(None), self.mesh)
        return opened.model.requires_grad_(False)

    def teacher(self, networks: Networks) -> Teacher | None:
        """The weights whose samples a student is measured beside, None where the objective has none; they are read for
        a time where they are not among the frozen networks.
        """
        name = self.config.objective.reference
        if name is None:
            return None

        @contextmanager
        def model() -> Iterator[VideoDiT]:
            # Its samples are kept for all runs with these weights, so that they are never those of rounded ones.
            kept = name in networks.frozen and not self.config.networks[name].fp8
            yield networks.frozen[name] if kept else self.frozen_at(self.weights(name))

        return Teacher(lambda: self.identity(self.weights(name)), model)

    @property
    def base(self) -> str | None:
        """The network that those with low-rank updates share, if one is shared."""
        return next((name for name, wanted in self.config.networks.items() if wanted.shared), None)

    def trained(self, name: str) -> VideoDiT:
        """A network of its own: trained whole, or its updates alone."""
        config, wanted = self.config, self.config.networks[name]
        if wanted.source is None:
            return self._random(name)
        weights = self.weights(name)
        opened = self.open(weights)
        if wanted.lora is None:
            return self._filled(opened, trained=name)
        if config.precision == "bf16":
            opened.model.cast(torch.bfloat16)
        identity = self.mesh.on_main(lambda: self.identity(weights))
        self._adapt(opened, name, weights, identity)
        return self._filled(opened, first_values(opened.model, name, config.seed), trained=name)

    def frozen(self, name: str) -> VideoDiT:
        """A network that is not trained, in 8-bit floats where it is asked for."""
        model = self.frozen_at(self.weights(name))
        return self._quantised(model) if self.config.networks[name].fp8 else model

    def frozen_at(self, weights: Path) -> VideoDiT:
        """Any weights as a network that is not trained. Raises: as `open`."""
        opened = self.open(weights)
        self._freeze(opened.model)
        return self._filled(opened, trained=None)

    def shared(self, base_name: str) -> tuple[dict[str, VideoDiT], dict[str, VideoDiT]]:
        """The base, and the networks with updates as views of it: those that are trained, and the frozen base."""
        names = [name for name, wanted in self.config.networks.items() if wanted.lora is not None]
        shared, views = self._on_base(self.weights(base_name), names)
        if self.mesh.is_main:
            logger.info("one frozen network is shared by the %s and %s", base_name, " and ".join(names))
        return views, {base_name: AdapterView(shared, None)}

    def with_writer(self) -> VideoDiT:
        """The generator, and what writes its context, as updates of a base that is theirs alone."""
        own = self.weights("generator")
        base = own if writer_updates(own) is None else check_base(own, read_base(own))
        return self._on_base(base, ["generator"])[1]["generator"]

    def _on_base(self, base: Path, names: Sequence[str]) -> tuple[SharedBase, dict[str, VideoDiT]]:
        """A frozen network with low-rank updates, and the networks that it is with these on."""
        config, mesh, apart = self.config, self.mesh, self.config.objective.writes_apart
        identity = mesh.on_main(lambda: self.identity(base))
        opened = self.open(base)
        self._freeze(opened.model)
        updates: list[Iterator[tuple[str, Tensor]]] = []
        views: list[tuple[str, type[AdapterView]]] = []
        for name in names:
            own, key = self.weights(name), config.networks[name].key
            self._check_base(name, own, base, identity)
            views.append((name, WriterApart if apart and name == "generator" else AdapterView))
            for role in [name, WRITER] if apart and name == "generator" else [name]:
                found = self._adapt(opened, name, base, identity, adapter_name=role)
                if own != base and is_adapter(own):
                    part: Part = "alone" if not apart else "writer" if role == WRITER else "reader"
                    begun = updates_of(own, part)
                    updates.append(earlier_values(opened.model, begun, found, f"{key}={begun}", adapter_name=role))
                else:
                    updates.append(first_values(opened.model, role, config.seed, adapter_name=role))
        switch = AdapterSwitch()
        opened = replace(opened, model=opened.model.executed(replace(opened.model.execution, updates=switch)))
        shared = SharedBase(self._filled(opened, *updates, trained=" and ".join(names)), switch)
        return shared, {name: view(shared, name) for name, view in views}

    def student(self, generator: VideoDiT) -> Denoiser:
        """The generator as it streams."""
        config, mesh = self.config, self.mesh
        sharded = generator.base.model if isinstance(generator, AdapterView) else generator
        once = mesh.fsdp_mesh is not None and config.gathers_once
        sequence, replays = 1 if mesh.sequence is None else mesh.sequence.size, config.objective.replays
        batches = config.batches_exit_backward(whole=mesh.fsdp_mesh is None, sequence=sequence)
        return Denoiser(
            generator,
            graphs=self._recorder() if self._captures else None,
            rounded=Rounded(generator, torch.bfloat16) if self._captures and config.precision == "bf16" else None,
            batched_exit_backward=batches and not replays,
            replays=replays,
            gathering=partial(gathered, sharded) if once else nullcontext,
        )

    # ---- parts ------------------------------------------------------------------------------------------------------
    def _adapt(self, opened: Opened, name: str, weights: Path, identity: str, adapter_name: str = DEFAULT) -> Adapter:
        lora = self.config.networks[name].lora
        assert lora is not None
        if (student := find_student(weights)) is not None:  # updates read their base without the table of students
            raise ConfigError(
                f"{self.config.networks[name].key} is {student.student.name}, a published student, on which low-rank "
                f"updates cannot be trained as it is; first write it out, `longtake convert {weights} FOLDER --to "
                "longtake`, and name FOLDER"
            )
        base = Base(reference_of(weights, self.config.logdir, self.config.folder), identity)
        found = adapt(opened, lora, base, weights, adapter_name=adapter_name)
        if self.mesh.is_main:
            count = sum(
                p.numel()
                for key, p in opened.model.named_parameters()
                if f".lora_A.{adapter_name}." in key or f".lora_B.{adapter_name}." in key
            )
            role = name if adapter_name == DEFAULT else adapter_name
            logger.info("%s: low-rank updates of %s, %d parameters are trained", role, weights, count)
        self.adapters[name] = found
        return found

    def _check_base(self, name: str, own: Path, base: Path, identity: str) -> None:
        """Raises ConfigError unless `own` are the weights of the base, or low-rank updates of them."""
        if own == base:
            return
        updates = is_adapter(own)
        found = self.mesh.on_main(lambda: read_base(own).identity if updates else weights_identity(own))
        if found != identity:
            what, networks = "updates of other weights" if updates else "other weights", self.config.networks
            raise ConfigError(
                f"shared_base=true holds one base for all, and {networks[name].key}={own} (SHA-256 {found[:16]}) are "
                f"{what} than {networks[self.base or name].key}={base} ({identity[:16]}); name the same weights or "
                f"updates of them, train the {name} whole (without lora), or set shared_base=false"
            )

    def check_heads(self) -> None:
        """Raises ConfigError when the ranks of a sequence group cannot share the heads of each network; from the heads
        of files, before any network is read.
        """
        if (together := self.config.parallel.sequence) == 1:
            return
        for name, wanted in self.config.networks.items():
            sizes = model_config(self.config.model.preset)
            if wanted.source is not None:
                sizes = open_source(self.weights(name), part="reader").model.config
            check_heads(sizes.num_heads, together)

    def check_start(self) -> None:
        """Raises ConfigError when a network begins as what this stage cannot use: before any is read."""
        self._check_rules()
        for name, wanted in self.config.networks.items():
            if wanted.causal and is_causal(self.config.source(wanted.source or ""), self.config.logdir) is False:
                raise ConfigError(
                    f"{wanted.key}={wanted.source} are bidirectional weights, as they say themselves, and the {name} "
                    "of objective.context_scores must be causal; name weights that teacher forcing has trained (a "
                    "stage causal), or set objective.context_scores.history_frames=0"
                )

    def _check_rules(self) -> None:
        """Raises ConfigError when a student begins as one that was unrolled by other rules than this stage's."""
        source = self.config.init_from
        if source is None:
            return
        self.open(self.weights("generator"), part="reader")  # heads of files only
        checkpoint = find_weights(self.weights("generator"), self.config.logdir).checkpoint
        if not self.config.objective.causal or checkpoint is None or not holds_student(checkpoint):
            return
        manifest = completed(read_manifest(checkpoint))
        for key, value in invariants(self.config).items():
            # With a pass of its own a block's context says nothing of the steps that it took.
            if key == "later_steps" and self.config.plan.context == "pass":
                continue
            if (before := manifest.get(key)) != json.loads(json.dumps(value)):
                raise ConfigError(f"{key}={value!r} is not that of init_from={source}, {before!r}; set it to that")

    def weights(self, name: str) -> Path:
        """What the network `name` is read from. Raises: CheckpointError."""
        source = self.config.networks[name].source
        assert source is not None
        return weights_folder(self.config.source(source), self.config.logdir)

    def open(self, source: Path, part: Part = "alone") -> Opened:
        """Weights before they are read, checked against the stage's condition; `part` of those of two networks.

        Raises: CheckpointError, ConfigError.
        """
        model, folder = self.config.model, weights_folder(source, self.config.logdir)
        opened = opened_as_asked(open_source(folder, part=part), model, self.config.seed)
        check_condition(opened.model.config, model, source)
        return opened

    def identity(self, source: Path) -> str:
        """What tells these weights from all others."""
        return weights_identity(source)

    def _freeze(self, model: VideoDiT) -> None:
        if self.config.precision == "bf16":  # autocast rounds the same weights the same way
            model.cast(torch.bfloat16)
        model.requires_grad_(False)

    @property
    def _captures(self) -> bool:
        """Whether the student's passes are captured: where its weights never move, and Python makes the calls."""
        config = self.config
        whole = self.mesh.fsdp_mesh is None and not config.parallel.compile and config.lora is None
        return config.parallel.graphs and whole and self._on_a_gpu and config.objective.causal

    @property
    def _on_a_gpu(self) -> bool:
        return self.mesh.device.type == "cuda"

    def _recorder(self) -> CUDAGraphRunner:
        return CUDAGraphRunner()

    def _quick(self, model: VideoDiT, *, sharded: bool, compiled: bool) -> Execution:
        calls = self.calls if self.config.parallel.graphs else None
        return quick(model, self.mesh.device, self._product_type, calls, sharded=sharded, compiled=compiled)

    def _quantised(self, model: VideoDiT) -> VideoDiT:
        # Quantising what enters a product must be part of the kernel before it, or it takes longer than it saves.
        return model.quantise().executed(replace(model.execution, fuses=self.mesh.device.type == "cuda"))

    def _random(self, name: str) -> VideoDiT:
        # The same random weights on every rank: sharding takes a slice of each.
        torch.manual_seed(self.config.seed)
        network = VideoDiT(model_config(self.config.model.preset)).to(self.mesh.device)
        return self._parallelized(network, name)

    def _filled(self, opened: Opened, *updates: Iterator[tuple[str, Tensor]], trained: str | None) -> VideoDiT:
        """Sharded while it is empty, then filled: a rank reads the slices that it keeps."""
        opened = replace(opened, model=self._parallelized(opened.model, trained))
        _fill(opened, self.mesh.device, chain(opened.read(None), *updates), self.mesh)
        return opened.model

    def _parallelized(self, model: VideoDiT, trained: str | None) -> VideoDiT:
        """Args: `trained`, the name by which it is, None where it is not."""
        config, mesh, again = self.config, self.mesh, None
        how = {"sharded": mesh.fsdp_mesh is not None, "compiled": config.parallel.compile}
        model = model.executed(replace(model.execution, fused_shards=config.parallel.fused_shards and how["sharded"]))
        model = model.executed(self._quick(model, **how))
        if trained is not None:
            again = recomputed(model, config.activation_checkpointing, self._keeps_some, **how)
            if isinstance(again, ByBlock):
                self.watched.append(Watched(trained, model.blocks, again, partial(self.calls.forms, model.blocks)))
        return parallelize(
            model,
            mesh,
            recompute=again,
            recompute_from=torch.bfloat16 if config.recompute_from == "bf16" else None,
            param_dtype=torch.bfloat16 if config.precision == "bf16" else None,
            compiled=config.parallel.compile,
        )

    @property
    def _product_type(self) -> torch.dtype:
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def _keeps_some(self, model: VideoDiT) -> bool:
        """Whether it can be on every rank: what one computes again in backward, all must, as they do it together."""

        def here() -> bool:
            return keeps_some(model.execution, self.mesh.device, self._product_type, model.config.head_width)

        return all(self.mesh.every(here))


def of_one_layer(sizes: DiTConfig) -> VideoDiT:
    """A transformer without weights that stands for one of these sizes where calls are only counted."""
    with torch.device("meta"):
        return VideoDiT(replace(sizes, num_layers=1))
