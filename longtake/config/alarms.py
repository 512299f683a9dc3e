"""What raises an alarm in a training, and which number says that a checkpoint is the best one so far."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longtake.config.base import Settings

Alarm = Literal["motion", "saturation", "seam", "uniform", "history"]
# The numbers of validations by which checkpoints can be compared: a ratio is best at 1, all else when it is low
Score = Literal[
    "distance_to_teacher",
    "motion_vs_teacher",
    "long_motion_vs_teacher",
    "saturation_vs_teacher",
    "long_saturation_vs_teacher",
    "position_error_px",
    "motion_ratio",
    "stop_rate",
    "shape_kept",
    "colour_kept",
    "count_kept",
]


class AlarmsConfig(Settings):
    """Limits past which a training is said to go wrong, in the log and in `alarms.jsonl`; null = no such alarm.

    Those of motion, saturation and seams must be passed in two validations one after another; the one before the first
    iteration does not count.
    """

    motion: float | None = Field(
        default=0.6,
        gt=0,
        description="least motion, as a share of the teacher's (in toy worlds without one: the truth's)",
    )
    saturation: float | None = Field(
        default=0.15,
        gt=0,
        description="most distance of the saturation at the end of clips from the teacher's, as a share",
    )
    drift: float | None = Field(
        default=0.1,
        gt=0,
        description="most distance of the saturation at the end of longer videos from that of the clips, as a share",
    )
    seam: float | None = Field(default=1.25, gt=1, description="highest seam score")
    uniform: float | None = Field(
        default=0.0, ge=0, lt=1, description="largest share of videos with a frame of a single colour"
    )
    history: float | None = Field(
        default=12.0,
        gt=0,
        description="most distance of the logarithm of a loss or gradient norm from its median over the last 200 rows, "
        "in deviations of these",
    )
    stop: list[Alarm] = Field(
        default=[], description="alarms that stop the run once it is saved; all others warn and it goes on"
    )
