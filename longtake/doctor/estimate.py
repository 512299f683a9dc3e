"""What a stage needs on each rank: its real networks, losses, backwards and optimizer steps, on tensors without data.

One iteration that updates every network runs under `FakeTensorMode` on the CPU, sharded over ranks of a process group
that sends nothing, and each storage is counted while it lives (`Meter`). Not counted: workspaces of GPU kernels, the
CUDA context, what passes take while they are replayed, fragments of the allocator, encoders that are resident
(`files.py` adds them), validation in toy worlds.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from longtake.config.groups import ParallelConfig
from longtake.config.stage import StageConfig
from longtake.doctor.fused import Fused
from longtake.doctor.validating import validate
from longtake.encoders.original import random_vae
from longtake.models import attention
from longtake.models.dit import VideoDiT
from longtake.models.execution import LARGE_WIDTH, Execution
from longtake.models.sequence_parallel import check_heads
from longtake.models.sizes import DiTConfig
from longtake.objectives.base import Objective
from longtake.parallel.mesh import Mesh
from longtake.rng import KeyedRNG
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.train.loop import MetricWindow, iteration
from longtake.train.made_batches import MadeBatches, made_codec
from longtake.train.metrics import PhaseTimer
from longtake.train.networks import Builder
from longtake.train.stage import InPrecision
from longtake.train.state import TrainState
from longtake.weights.load import Opened
from longtake.weights.two_networks import Part

# Depth at which networks are traced. Every layer repeats the one before it, so at each point of a layer's forward or
# backward the bytes are affine in the number of the layer and in the depth, and the most is found in one of the first
# or last layers: two of each, since what a layer leaves behind or fetches ahead (FSDP) reaches one layer further. So
# one more trace, a layer deeper, gives these points at any depth exactly; a test compares them with a whole trace.
DEPTH, EDGE = 4, 2

_CONDITION = ("in_channels", "out_channels", "text_dim", "text_len", "image_dim", "image_positions")
PARTS = ("trained weights", "frozen weights", "optimizer", "average")


# Sizes of a stage's networks by `generator`, `critic`, `teacher`
Sizes = Mapping[str, DiTConfig]


@dataclass(frozen=True)
class Need:
    """Bytes of one rank: `at_rest`, what is there all the time by what for, and the most at once, at a `moment` that is
    told in words. `checkpoint` is the disk that one checkpoint takes, of all ranks together.
    """

    at_rest: dict[str, int]
    peak: int
    moment: str
    checkpoint: int


def stage_need(
    config: StageConfig, sizes: Sizes, world_size: int, *, image_tokens: int = 0, vae: Mapping[str, Any] = {}
) -> Need:
    """What each of `world_size` ranks needs to train a stage, resident encoders left out.

    Args: `image_tokens` of a picture; `vae`, the VAE's configuration where it is not Wan2.1's (long tuning decodes).
    Raises: ConfigError when batch, heads or `parallel` do not fit the ranks.
    """
    config.accumulation(world_size)
    for size in sizes.values():
        check_heads(size.num_heads, config.parallel.sequence)
    # All read the condition of the student, also where sizes are guessed because weights are missing.
    given = {name: getattr(sizes["generator"], name) for name in _CONDITION}

    def traced(depth: Callable[[int], int]) -> list[Moment]:
        cut = {name: replace(size, num_layers=depth(size.num_layers), **given) for name, size in sizes.items()}
        return [moment for moment in trace(config, cut, world_size, image_tokens, vae) if not moment.inner]

    found = short = traced(lambda layers: min(layers, DEPTH))
    for layers in {size.num_layers for size in sizes.values() if size.num_layers > DEPTH}:
        longer = traced(lambda n: min(n, DEPTH) + (n == layers))  # noqa: B023 (called at once)
        triples = zip(found, short, longer, strict=True)
        found = [replace(a, size=a.size + (layers - DEPTH) * (c.size - b.size)) for a, b, c in triples]
    checkpoint, *rest = found[: 1 + len(PARTS)]
    at_rest = {moment.where: moment.size for moment in rest}
    most = max(found[1 + len(PARTS) :], key=lambda moment: moment.size)
    return Need(at_rest, most.size, most.where, checkpoint.size)


@dataclass
class Moment:
    """The most bytes of one stretch of an iteration: of a layer, where `inner` says that it is none of the first or
    last, or of what is outside of layers.
    """

    where: str
    size: int
    inner: bool = False


class Meter(TorchDispatchMode):
    """Counts the bytes of storages that are made while it is on, until they are freed; `with meter.fake, meter:`."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.where, self.now = "the start", 0
        self.moments = [Moment(self.where, 0)]
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _keeps_values(func, tensors, args, kwargs):  # masks and places, computed without FakeTensorMode
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 1.0  # there are no data: any number will do
        if func.overloadpacket in _INDEXED:
            with unset_fake_temporarily():
                args = tree_map_only(Tensor, _selected, args)
        out = func(*args, **kwargs)
        # Optimizers of a GPU are one kernel, where the CPU's keep results of a list of tensors in between.
        if not func.name().startswith("aten::_foreach_"):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                    self._add(_storage(leaf))
        if func is torch.ops.aten.convolution.default and out.ndim == 5:
            # cuDNN works on copies in a layout of its own: not seen, but one H200 took as much more for them.
            self._reach(self.now + args[0].nbytes + out.nbytes)
        return out

    def mark(self, *, inner: bool = False) -> None:
        """Begins another stretch."""
        self.moments.append(Moment(self.where, self.now, inner))

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Inside is a stretch of its own."""
        before, self.where = self.where, what
        self.mark()
        yield
        self.where = before
        self.mark()

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._drop, key).atexit = False
            self._grow(key, storage.nbytes())

    def _grow(self, key: int, size: int) -> None:
        if key in self._sizes:
            self._sizes[key] += size
            self.now += size
            self._reach(self.now)

    def _reach(self, size: int) -> None:
        self.moments[-1].size = max(self.moments[-1].size, size)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Inside, storages that change their size are followed: FSDP frees gathered weights so."""
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            result = resize(storage, size)
            self._grow(storage._cdata, size - before)
            return result

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


_INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)


def _storage(tensor: Any) -> torch.UntypedStorage:
    """Of what this rank holds; `to_local` would make another tensor of it."""
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()


def _selected(x: Tensor) -> Tensor:
    return x.nonzero()[:, 0] if x.dtype == torch.bool and not isinstance(x, FakeTensor) else x


def _keeps_values(func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> bool:
    """Whether integers and masks are made of integers and masks alone: who sees whom, and where, must be known."""
    dtype = kwargs.get("dtype")
    if dtype is None and not tensors:
        return func.overloadpacket is torch.ops.aten.arange and all(isinstance(x, int) for x in args)
    if any(isinstance(x, FakeTensor) or x.dtype.is_floating_point or x.device.type != "cpu" for x in tensors):
        return False
    return not dtype.is_floating_point if dtype is not None else not any(isinstance(x, float) for x in args)


class _Parts(PhaseTimer):
    """Tells the meter which part of which update runs."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter, self.turn = meter, ""

    def __call__(self, name: str) -> Any:
        return self.meter.during(f"{name} in the update of the {self.turn}")

    @contextmanager
    def whole(self, name: str) -> Iterator[None]:
        self.turn, self.meter.where = name, f"the update of the {name}"
        yield


class _Chosen(KeyedRNG):
    """Random numbers whose integers are chosen. A roll-out stops at its second step: a later one does as the second
    did, holding nothing more; the student's own history is made, and videos are the longest.
    """

    def integer(self, step: int, purpose: str, low: int, high: int, part: int = 0) -> int:
        chosen = {"exit_step": low + 1, "later_exit_step": low + 1, "own_history": low}.get(purpose, high - 1)
        return min(chosen, high - 1)


class _OneOfMany(Mesh):
    """A rank whose group sends nothing: all other ranks do as it does."""

    def every(self, work: Any) -> list[Any]:
        return [work()] * self.world_size

    def gather(self, values: Any) -> Tensor:
        return torch.tensor([list(values)] * self.world_size, dtype=torch.float64)


@contextmanager
def ranks(parallel: ParallelConfig, world_size: int) -> Iterator[Mesh]:
    """The mesh of the first of `world_size` ranks of a stage, which are not there."""
    if world_size == 1:
        yield Mesh()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        group = init_device_mesh("cpu", (world_size,), mesh_dim_names=("shard",))
        yield _OneOfMany(0, world_size, torch.device("cpu"), group).arranged(parallel)
    finally:
        dist.destroy_process_group()


def network(sizes: DiTConfig) -> VideoDiT:
    """A network whose calls are traced: it has no weights, and attends and fuses as on a GPU."""
    return VideoDiT(sizes, Fused(attend=as_on_a_gpu))


def vae_without_data(channels: int, dtype: torch.dtype, sizes: Mapping[str, Any] = {}) -> nn.Module:
    """As `random_vae`, for a trace to fill by `to_empty`: networks without data cannot be cast."""
    with torch.device("meta"):
        return nn.Module.to(random_vae(channels, sizes), dtype)  # its own `to` remarks on types that no module has


@dataclass(kw_only=True)
class SizedBuilder(Builder):
    """Builds networks from sizes instead of files: what `open` gives of each name is not read."""

    sizes: Sizes

    def check_start(self) -> None:
        """There are no files that could be of another stage."""

    def weights(self, name: str) -> Path:
        """The network's name; one for all that share a base."""
        return Path(self.base or name)

    def identity(self, source: Path) -> str:
        """The name."""
        return source.name


@dataclass(kw_only=True)
class _Hollow(SizedBuilder):
    """Networks without weights: storages without data."""

    meter: Meter

    def __post_init__(self) -> None:
        """`activation_checkpointing=auto` stays: a GPU is planned for, and what its first iterations need."""

    def _keeps_some(self, model: VideoDiT) -> bool:
        return True

    @property
    def _on_a_gpu(self) -> bool:
        return True  # one is planned for

    def _quick(self, model: VideoDiT, *, sharded: bool, compiled: bool) -> Execution:
        # Of low-rank updates what runs unfused is traced, which is within 3 % of what was measured of them.
        whole = all(wanted.lora is None for wanted in self.config.networks.values())
        return replace(model.execution, fuses=whole and not compiled and model.config.dim >= LARGE_WIDTH)

    def _recorder(self) -> CUDAGraphRunner:
        """Of passes without data, for all that lasts between them: the cache, places of inputs and results."""
        return CUDAGraphRunner(lambda *works: [(lambda: None, work()) for work in works])

    def open(self, source: Path, part: Part = "alone") -> Opened:
        with torch.device("meta"):
            model = network(self.sizes[source.name])
        for layer, block in enumerate(model.blocks):
            mark = partial(self.meter.mark, inner=EDGE <= layer < len(model.blocks) - EDGE)
            block.register_forward_pre_hook(lambda *_, mark=mark: mark())
            block.register_forward_hook(lambda _block, _inputs, out, mark=mark: _before_backward(out, mark))
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

        def read(names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
            return ((name, torch.ones(1).expand(shapes[name])) for name in names or ())

        return Opened(model, read, str)

    def _random(self, name: str) -> VideoDiT:
        return self._filled(self.open(Path("generator")), trained=name)

    def frozen_at(self, weights: Path) -> VideoDiT:
        with unset_fake_temporarily():  # also in the middle of a trace: what has no data yet is none of its tensors
            return super().frozen_at(weights)

    def _quantised(self, model: VideoDiT) -> VideoDiT:
        with self.meter.fake, self.meter:
            return super()._quantised(model)

    def _filled(self, opened: Opened, *updates: Any, trained: str | None) -> VideoDiT:
        model = self._parallelized(opened.model, trained)
        with self.meter.fake, self.meter:
            model.to_empty(device="cpu")
        return model


def _before_backward(out: object, mark: Callable[[], None]) -> None:
    if isinstance(out, Tensor) and out.requires_grad:  # without gradient a block may leave its last gate to the next
        out.register_hook(lambda _: mark())


def as_on_a_gpu(q: Tensor, k: Tensor, v: Tensor, *, mask: attention.FrameMask | None = None) -> Tensor:
    """Attention with the memory that it takes there: masks by which a key is seen more than once are flex attention's,
    which copies no keys.
    """
    if mask is not None and sum(len(seen) for _, _, seen in mask.parts) > mask.allowed.shape[1]:
        mask = None
    return attention.attend(q, k, v, mask=mask)


def trace(
    config: StageConfig, sizes: Sizes, world_size: int, image_tokens: int, vae: Mapping[str, Any]
) -> list[Moment]:
    """Bytes of a checkpoint, of each of `PARTS`, and of each stretch of an iteration that updates every network.

    Args: as `stage_need`.
    """
    # Compiled blocks need no more than these.
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"compile": False})})
    meter = Meter()
    with meter.fake:
        frames, codec = config.video.num_latent_frames, None
        if config.objective.decodes:  # whose weights are those of the resident encoders
            codec = made_codec(vae, sizes["generator"], image_tokens, frames)
    with ranks(config.parallel, world_size) as mesh, meter.resizing(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # a training says it, too
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # to see whether it has changed
        builder = _Hollow(config, mesh, sizes=sizes, meter=meter)
        networks = builder.build()
        phases, draws = _Parts(meter), _Chosen(config.seed)
        accumulation, rows = config.accumulation(world_size), config.micro_batch(world_size)
        if codec is None:
            accumulation = min(2, accumulation)  # all but the first find gradients; running videos add up
        batches: Any = MadeBatches(config, sizes["generator"], image_tokens, accumulation, rows)
        of_rows = config.validates and config.validation.num_rows > 0
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        decoder = vae_without_data(sizes["generator"].out_channels, dtype, vae) if of_rows else None
        with meter.fake, meter:
            inner = builder.objective(networks, codec, phases, draws)
            objective = InPrecision(inner, mesh, bf16=config.precision == "bf16", on_a_gpu=True)
            state = builder.state(inner)
            state.step = _busiest(inner)
            kept = _kept([*networks.trained.values(), *networks.frozen.values()], state)
            iteration(state, objective, batches, config, mesh, phases, MetricWindow())
            if decoder is not None:
                validate(builder, networks, state.ema.get("generator"), next(batches)[0], decoder, meter.during)
        exported = 4 * sum(p.numel() for p in networks.trained["generator"].parameters() if p.requires_grad)
        saved = sum(tensor.nbytes for tensor in state.tensors().values()) + exported * (1 + len(state.ema))
    return [Moment("checkpoint", saved), *kept, *meter.moments]


def _busiest(objective: Objective) -> int:
    """An iteration that updates every network, of running videos in a chunk that goes on after another."""

    def order(step: int) -> tuple[int, bool, int]:
        chunk = objective.chunk(step)
        return -len(objective.turns(step)), chunk == 0, chunk

    most = len(objective.networks)
    first = next((step for step in range(1 << 20) if len(objective.turns(step)) == most), 0)
    return min(range(first, first + 200), key=order)


def _kept(networks: Sequence[nn.Module], state: TrainState) -> list[Moment]:
    """What is there all the time, by `PARTS`."""
    weights = [p for network in networks for p in network.parameters()]
    moments = [t for optimizer in state.optimizers.values() for t in optimizer.tensors().values()]
    average = [t for one in state.ema.values() for t in one.tensors().values()]
    trained, frozen = ([p for p in weights if p.requires_grad is on] for on in (True, False))
    groups: list[list[Any]] = [trained, frozen, moments, average]
    sizes = ({s._cdata: s.nbytes() for s in map(_storage, group)} for group in groups)
    return [Moment(name, sum(by_storage.values())) for name, by_storage in zip(PARTS, sizes, strict=True)]
