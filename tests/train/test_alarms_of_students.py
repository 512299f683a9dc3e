"""Alarms over videos of the packaged student as it is, and broken on purpose: what a validation would say of it."""

from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from longtake.condition import pixel_frames
from longtake.config.alarms import AlarmsConfig
from longtake.config.groups import WorldConfig
from longtake.config.stage import TOY_ASSETS
from longtake.evaluation import row_videos as rv
from longtake.evaluation.instruments import Blocks, Measured
from longtake.evaluation.row_reader import Reading, RowReader
from longtake.inference.source import Source
from longtake.models.dit import VideoDiT
from longtake.parallel.mesh import Mesh
from longtake.rollout.denoise import Denoiser
from longtake.toy.files import write_world
from longtake.train.alarms import Watch
from longtake.weights.load import load_dit

SHORT, LONG = 9, 33  # latent frames
ROWS, SEEDS = 3, 5


class Broken(Denoiser):
    """A student whose prediction of a block's clean latents goes wrong in one way, before the next block builds on it."""

    def __init__(self, model: VideoDiT, kind: str) -> None:
        super().__init__(model)
        self.kind, self.first = kind, None

    def __call__(self, x, sigma, condition, cache, *, commit=False, layers=None):
        velocity = super().__call__(x, sigma, condition, cache, commit=commit, layers=layers)
        if commit:
            self.first = x[:, -1:] if self.first is None else self.first  # the given picture
            return velocity
        level, block = sigma.view(-1, 1, 1, 1, 1), (cache.position - 1) // x.shape[1]
        return (x - self._spoilt(x - level * velocity, block)) / level

    def _spoilt(self, clean: Tensor, block: int) -> Tensor:
        if self.kind == "freezes":  # three tenths of every change are left
            return self.first + 0.3 * (clean - self.first)
        if self.kind == "fades":
            return clean * 0.98 ** (block + 1)
        assert self.kind == "collapses"
        return clean.mean((-2, -1), keepdim=True).expand_as(clean) if block else clean


class Toy:
    """The packaged student, its teacher, and rows of the toy world."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, Source.of_model("toy")
        places = self.source.weights, TOY_ASSETS / "teacher"
        self.student, self.teacher = (load_dit(path).eval().requires_grad_(False) for path in places)

    @cache  # noqa: B019 (it lives as long as the tests of this file)
    def reading(self, seed: int) -> Reading:
        """Rows of their own for each seed, and what decodes."""
        world = WorldConfig(num_worlds=ROWS, num_frames=9, seed=11 + seed, formats=["images"])
        folder = write_world(self.folder / str(seed), world)
        return RowReader(folder / "images", ROWS, Mesh()).read(self.source)

    def measured(self, seed: int, make: rv.Maker, cuts: list[rv.Cut]) -> list[list[Measured]]:
        """The beginnings of the videos of the rows, by cut."""
        reading = self.reading(seed)
        videos = [rv.look(row.name, rv.decoded(reading.decoder, make(row)), 16, cuts) for row in reading.rows]
        return [[video.measured for video in part] for part in zip(*videos)]

    @cache  # noqa: B019 (it lives as long as the tests of this file)
    def of_teacher(self, seed: int) -> list[Measured]:
        """Sampled as the toy recipes sample it in validations."""
        sampling = {"num_steps": 10, "shift": 5.0, "guidance": 1.0, "first_frame_clean": False}
        return self.measured(seed, rv.teacher_maker(self.teacher, SHORT, seed=seed, **sampling), [_cut(SHORT)])[0]

    def numbers(self, kind: str, seed: int, lengths: list[int]) -> dict[str, float]:
        """What a validation of rows would log."""
        plan = self.source.plan

        def make(row: rv.VideoRow) -> Tensor:
            denoiser = Denoiser(self.student) if kind == "healthy" else Broken(self.student, kind)
            return rv.student_maker(denoiser, plan, lengths[-1], seed=seed)(row)

        found: dict[str, float] = {}
        cuts = [_cut(length, rv.blocks_of(plan, length, 4)) for length in lengths]
        for own, start in zip(self.measured(seed, make, cuts), ("", "long_")):
            both = rv.means(own) | rv.against(own, self.of_teacher(seed))
            found |= {f"validation/{start}{name}": value for name, value in both.items()}
        return found


def _cut(num_latent_frames: int, blocks: Blocks | None = None) -> rv.Cut:
    return rv.Cut(pixel_frames(num_latent_frames, 4), blocks)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Toy(tmp_path_factory.mktemp("rows"))


def alarms(numbers: dict[str, float]) -> list[set[str]]:
    """What is raised in two validations one after another."""
    watch = Watch(AlarmsConfig())
    return [{one.alarm for one in watch.validation(step, numbers)} for step in (1, 2)]


@pytest.mark.parametrize(
    ("kind", "wanted"), [("healthy", set()), ("freezes", {"motion"}), ("collapses", {"saturation", "uniform"})]
)
def test_the_packaged_student_raises_no_alarm_and_broken_ones_theirs(toy, kind, wanted):
    """In the length of the training."""
    first, second = alarms(toy.numbers(kind, 0, [SHORT]))
    assert second >= wanted and first <= {"uniform"} and (bool(second) == bool(wanted)), second


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("healthy", set()), ("freezes", {"motion"}), ("fades", {"saturation"}), ("collapses", {"saturation", "uniform"})],
)
def test_students_of_five_seeds(toy, kind, wanted, seed):
    """Other rows and other noise each, also four times as long."""
    _, second = alarms(toy.numbers(kind, seed, [SHORT, LONG]))
    assert second >= wanted and bool(second) == bool(wanted), second
