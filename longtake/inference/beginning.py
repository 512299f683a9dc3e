"""How a video begins: with a given picture, or with a first block that is generated from the prompt alone.

Which of the two weights can do follows from their sizes and from the rule `picture`. Must know no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from longtake.config.generation import GenerationConfig
from longtake.errors import ConfigError
from longtake.models.sizes import DiTConfig
from longtake.plan import StreamPlan

# What is said of a video whose picture its weights were never trained with
_ZERO_SHOT = {
    "frame": "zero-shot image-to-video: the picture is a clean first latent (picture=frame)",
    "still": "zero-shot image-to-video: the picture stands still for the first block (picture=still)",
}


@dataclass(frozen=True)
class Beginning:
    """What a scene of these weights can begin with. Made by `of`.

    Fields: `plan`, that of a scene without a picture; `picture`, how one enters, as the rule of that name; `needed`:
    there is no scene without one.
    """

    plan: StreamPlan
    picture: str
    needed: bool

    @classmethod
    def of(cls, sizes: DiTConfig, settings: GenerationConfig) -> Beginning:
        """That of weights of these sizes under these rules.

        Raises: ConfigError for a first block that leaves the picture no place, and for a rule that the weights cannot
        follow.
        """
        plan, with_y = settings.stream_plan, sizes.condition_channels > 0
        picture = settings.picture or ("none" if sizes.model_type == "t2v" and not with_y else "trained")
        if with_y and picture != "trained":
            raise ConfigError(
                f"picture={picture} is for weights that know text alone, and these take a picture in "
                f"{sizes.condition_channels} channels of y; leave it out"
            )
        if with_y and plan.first_frames != 1:
            raise ConfigError(
                f"plan.first_frames={plan.first_frames} must be 1 for image-to-video weights: the given picture is a "
                "block of its own; leave it out"
            )
        return cls(plan, picture, with_y)

    def check(self, *, given: bool) -> None:
        """Raises ConfigError unless a scene can begin with a picture (`given`), or without one."""
        if self.needed and not given:
            raise ConfigError("these are image-to-video weights, and there is no picture; give one: --image FILE")
        if given and self.picture == "none":
            raise ConfigError(
                "these are text-to-video weights, which take no picture; leave it out, or have it taken zero-shot, "
                "with picture=frame (a clean first latent) or picture=still (a first block that stands still)"
            )
        if given:
            self._check_window()

    def plan_of(self, *, given: bool) -> StreamPlan:
        """How a scene streams that begins with a picture, which is a block of its own unless it stands still.

        Zero-shot, it takes the place of the first block, and `context_from` counts on from it, as Causal-rCM does.
        """
        if not given:
            return self.plan
        frames = self.plan.first_frames if self.picture == "still" else 1
        first = max(0, self.plan.context_from - (self.picture != "trained"))
        return self.plan.but(first_frames=frames, given_frames=frames, context_from=first)

    def zero_shot(self, *, given: bool) -> str | None:
        """What is to be said of a scene whose picture the weights were not trained with; None: they were, or it has
        none.
        """
        return _ZERO_SHOT.get(self.picture) if given else None

    def _check_window(self) -> None:
        try:
            self.plan_of(given=True).check_window()
        except ConfigError as error:
            n = self.plan.first_frames
            raise ConfigError(
                f"a picture as a block of its own makes other blocks than text alone, where the first has {n} frames: "
                f"{error}; or take the picture as picture=still"
            ) from None
