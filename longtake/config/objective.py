"""What a stage trains by: the base of every objective's own group of keys, and the names of those that ship.

`objective: {kind: dmd, ...}` is read as the group that `kind` names. The group holds the keys that this objective alone
reads, says what it needs, and builds it. Files of objectives import torch only inside functions, so that a recipe is
read without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny

from longtake.config.base import Settings
from longtake.config.groups import LoraConfig, OptimConfig
from longtake.errors import ConfigError
from longtake.plan import StreamPlan

if TYPE_CHECKING:
    from longtake.objectives.base import Objective, Parts

# The objectives that ship, in the order in which stages usually follow each other. A new one is one line here.
KINDS = {
    "flow_matching": "longtake.objectives.flow_matching:FlowMatchingConfig",
    "teacher_forcing": "longtake.objectives.teacher_forcing:TeacherForcingConfig",
    "ode_regression": "longtake.objectives.ode_regression:OdeRegressionConfig",
    "dmd": "longtake.objectives.dmd:DmdConfig",
    "long_tuning": "longtake.objectives.long_tuning:LongTuningConfig",
}


@dataclass(frozen=True)
class NetworkConfig:
    """A network of a stage: `source` of its first weights, which the key `key` names, None for random ones.

    Fields: `optim`, None for a network that is not trained; `lora`, None where all weights are; `shared`, whether the
    networks with low-rank updates are this one with their updates, held once; `fp8`, whether one that is not trained
    has its large weights in 8-bit floats; `causal`, whether weights that say of themselves that they are bidirectional
    are refused.
    """

    key: str
    source: str | None
    optim: OptimConfig | None = None
    lora: LoraConfig | None = None
    shared: bool = False
    fp8: bool = False
    causal: bool = False


@dataclass(frozen=True)
class TeacherSampling:
    """How a teacher makes data (`longtake teacher-data`).

    Fields: `source` of its weights, which the key `key` names; `causal`, whether it makes each block after real frames
    before it, else it is bidirectional and makes whole clips; `num_steps` Euler steps from noise; `guidance`, w in
    uncond + w (cond - uncond); `keeps_path`, whether states on the way are kept, at the levels of the student.
    """

    key: str
    source: str
    causal: bool
    num_steps: int
    guidance: float
    keeps_path: bool


class ObjectiveConfig(Settings):
    """What the networks are trained by; `kind` says which of the other keys there are."""

    kind: str = Field(description=f"{', '.join(KINDS)}, or MODULE:CLASS of one of your own (docs/extending.md)")

    # What it needs. Whether it trains a student that streams (else a bidirectional model); may begin with random
    # weights; decodes and encodes pictures while it trains; has rows with a second prompt.
    causal: ClassVar[bool] = True
    from_scratch: ClassVar[bool] = False
    decodes: ClassVar[bool] = False
    # The network whose first weights are bidirectional and made for whole clips: what the student is measured beside.
    reference: ClassVar[str | None] = None
    # Keys of the stage, dotted, that a resumed run must share beside those of every stage.
    resume_keys: ClassVar[tuple[str, ...]] = ()

    @property
    def learns_from_videos(self) -> bool:
        """Whether rows must be videos, or latents of videos."""
        return True

    @property
    def num_clip_frames(self) -> int | None:
        """Latent frames of the rows' videos, where these are not those of `video`."""
        return None

    @property
    def second_prompts(self) -> bool:
        """Whether rows must have a second prompt."""
        return False

    @property
    def paths(self) -> TeacherSampling | None:
        """How the teacher's paths are made that rows must hold."""
        return None

    @property
    def takes_switches(self) -> bool:
        """Whether videos may be learnt from whose caption changes on the way; where not, such a row is a bad one."""
        return False

    @property
    def replays(self) -> bool:
        """Whether the student's roll-outs have gradient into the context that they write (`rollout/replay.py`)."""
        return False

    @property
    def writes_apart(self) -> bool:
        """Whether low-rank updates of their own write the context that the student reads (`models/shared_base.py`)."""
        return False

    @property
    def empty_prompt(self) -> str:
        """The text of the unconditional side."""
        return ""

    def networks(self) -> Mapping[str, NetworkConfig]:
        """The networks beside the `generator`, by name."""
        return {}

    def check(self, plan: StreamPlan, num_latent_frames: int, *, with_picture: bool, lora: bool) -> None:
        """Raises ConfigError on values that contradict the stage's.

        Args: `plan`, how the student streams; `num_latent_frames` of a clip; `with_picture`, whether frame 0 is given;
        `lora`, whether the generator has low-rank updates.
        """

    def build(self, parts: Parts) -> Objective:
        """The objective, of networks that are there."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built: it needs a method `build`")

    @classmethod
    def chosen(cls, values: Any) -> type[Settings]:
        kind = values.get("kind") if isinstance(values, Mapping) else None
        return _class_of(kind) if isinstance(kind, str) else cls

    @classmethod
    def choices(cls) -> dict[str, type[Settings]]:
        return {kind: _class_of(kind) for kind in KINDS} if cls is ObjectiveConfig else {}


def _class_of(kind: str) -> type[ObjectiveConfig]:
    """The group that a kind names. Raises: ConfigError."""
    module, colon, name = KINDS.get(kind, kind).partition(":")
    if not (colon and module and name):
        raise ConfigError(f"kind={kind} is not known; give {', '.join(KINDS)}, or MODULE:CLASS of one of your own")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"kind={kind} cannot be imported ({error}); MODULE must be on PYTHONPATH and have that CLASS"
        ) from error
    if not (isinstance(found, type) and issubclass(found, ObjectiveConfig)):
        raise ConfigError(f"kind={kind} is no group of an objective; it must be a subclass of ObjectiveConfig")
    return found


def _of_kind(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    if not isinstance(values.get("kind"), str):
        raise ValueError(f"kind: missing; it says what is trained: {', '.join(KINDS)}, or MODULE:CLASS")
    return _class_of(values["kind"]).model_validate(dict(values))


# The type of a field that is read as the group of its `kind`, and written with all keys of that group.
ChosenObjective = Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(_of_kind)]
