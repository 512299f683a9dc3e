"""What the training loop asks of an objective, and what an objective is built from. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from longtake.models.dit import VideoDiT
    from longtake.models.flops import Call
    from longtake.plan import StreamPlan
    from longtake.rng import KeyedRNG
    from longtake.rollout.denoise import Denoiser
    from longtake.rollout.long_video import PictureCodec

# phase(name) -> context manager that a caller times
Phase = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class LossResult:
    """The loss of one micro-batch.

    Fields: `loss`, a scalar with gradient, the mean over the samples of the micro-batch; `metrics`, scalars to log
    under exactly these names (the same names on every rank).
    """

    loss: Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """What an objective is built from.

    Fields: `student`, the generator as it streams by `plan`; `trained` and `frozen` networks by name; `draws`, the
    source of every random number; `shift` of noise levels; `num_frames` latents of a clip, of which the first `given`
    (1 or 0) are; `first_frame_clean`, whether bidirectional models see frame 0 without noise; `codec`, None unless the
    objective `decodes`; `sharded`, whether all ranks must make the same calls of networks; `phase` is entered around
    parts of an iteration, for timing.
    """

    student: Denoiser
    trained: Mapping[str, VideoDiT]
    frozen: Mapping[str, VideoDiT]
    draws: KeyedRNG
    plan: StreamPlan
    shift: float
    num_frames: int
    given: int = 1
    first_frame_clean: bool = False
    codec: PictureCodec | None = None
    sharded: bool = False
    phase: Phase = nullcontext


@dataclass(frozen=True)
class Pass:
    """`times` equal calls of one network, in the phase of `train/loop.py` that they belong to.

    `with_grad`: a backward follows each of them. `ahead` False: their forward is that of other passes.
    """

    network: str
    phase: str
    call: Call
    with_grad: bool = False
    times: float = 1.0
    ahead: bool = True


class Objective:
    """A loss over one or more networks that are trained in turn.

    `networks` holds the trained networks by name. An iteration calls, for each name in `turns(step)` and each
    micro-batch, `loss(turn, batch, step)`, whose gradient updates `networks[turn]` alone. Every random number must be
    a function of (seed, step, purpose, global sample index), never of earlier calls: this is what makes a resumed run
    equal to an uninterrupted one.
    """

    networks: dict[str, nn.Module]

    def __init__(self, parts: Parts) -> None:
        self.networks, self.parts = dict(parts.trained), parts
        self.draws, self.phase = parts.draws, parts.phase
        self.plan = parts.plan.with_given(parts.given)

    def turns(self, step: int) -> list[str]:
        """Names of the networks that iteration `step` updates, in order; the same on every rank."""
        return ["generator"]

    def loss(self, turn: str, batch: Any, step: int) -> LossResult:
        """Loss of one micro-batch (`objectives.batch.EncodedBatch`) for the network named `turn`."""
        raise NotImplementedError

    def discard(self) -> None:
        """Forgets what later iterations would go on with: an update was skipped because something was not finite.

        Called on every rank alike. Most objectives have nothing that goes on from one iteration to the next.
        """

    def chunk(self, step: int) -> int:
        """Which part of videos that go on over several iterations iteration `step` makes; 0 = their beginning."""
        return 0

    def batches(self, loaded: Any, batch_size: int) -> Any:
        """The micro-batches of the iterations, from those of the data in their order (`train.loop.Batches`)."""
        return loaded

    def passes(self, step: int, clips: Mapping[str, Call]) -> Sequence[Pass]:
        """The calls of networks that iteration `step` makes, by which utilisation is logged; none = it is not.

        Args: `clips`, by network, all frames of a clip in one bidirectional call. Encoders, the VAE and rebuilt caches
        are not counted.
        """
        return ()
