"""What a stage makes and measures while it trains."""

from __future__ import annotations

from pydantic import Field

from longtake.config.base import PathText, Settings


class ValidationConfig(Settings):
    """What a stage generates and measures while it trains: rows of data that it never learns from, with `num_rows`
    above 0, else held-out toy worlds, where the stage has their size.
    """

    num_rows: int = Field(
        default=0, ge=0, le=10_000, description="rows of data whose videos are made and measured; 0 = toy worlds"
    )
    data: PathText | None = Field(
        default=None,
        description="where these rows are, its first ones: a folder, a table or an encoded set; null = they are the "
        "last rows of data.path (at most a quarter), which training leaves out",
    )
    times_longer: int = Field(
        default=4,
        ge=1,
        le=1000,
        description="rows are also streamed for so many times the length of the training clips, under the second "
        "prompt from the middle on where all have one; 1 = they are not",
    )
    max_share: float = Field(
        default=0.03,
        gt=0,
        le=1,
        description="most of the training time that validations of rows take: one that is due is left out while there "
        "is no time for it, but never the first and the last of a run; 1 = none is left out",
    )
    teacher_samples: PathText | None = Field(
        default=None,
        description="folder that keeps the teacher's samples of the rows, for all runs with these weights and rows; "
        "null = `teacher_samples` beside the log folder",
    )
    num_worlds: int = Field(default=8, ge=0, description="worlds generated at each validation; 0 = none")
    num_latent_frames: int | None = Field(
        default=None, gt=0, description="length in toy worlds; null = that of the training clips"
    )
    seed: int = Field(
        default=1_000_033, ge=0, description="seed of worlds and noise; must differ from the training data's"
    )
    teacher_steps: int = Field(default=20, gt=0, description="sampling steps of the teacher that is shown beside")
    teacher_guidance: float = Field(default=1.0, ge=0, description="guidance w of the teacher that is shown beside")

    def held_rows(self, num_rows: int) -> int:
        """How many of the last of `num_rows` rows of the training data are kept from training, also while nothing is
        validated: then validating or not changes no number of the training.
        """
        if self.data is not None or num_rows < 2:
            return 0
        return min(self.num_rows, max(1, num_rows // 4))
