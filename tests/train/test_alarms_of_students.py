"""Alarms over videos of the packaged student as it is, and broken on purpose: what a validation would say of it."""

from dataclasses import dataclass

import pytest
from torch import Tensor

from longtake.condition import pixel_frames
from longtake.config.alarms import AlarmsConfig
from longtake.config.groups import WorldConfig
from longtake.config.stage import TOY_ASSETS
from longtake.evaluation import row_videos as rv
from longtake.evaluation.row_reader import RowReader
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


@dataclass
class Toy:
    """The packaged student, its teacher, and rows of the toy world."""

    source: Source
    student: VideoDiT
    teacher: VideoDiT
    rows: list[rv.VideoRow]
    decoder: object

    def seen(self, make: rv.Maker, numbers: range, lengths: list[int], plan=None) -> list[list[rv.SeenVideo]]:
        """By length the videos of these rows."""
        cuts = [rv.Cut(pixel_frames(n, 4), plan and rv.blocks_of(plan, n, 4)) for n in lengths]
        videos = [(self.rows[k], list(rv.decoded(self.decoder, make(self.rows[k])))) for k in numbers]
        return list(zip(*(rv.look(row.name, frames, 16, cuts) for row, frames in videos)))

    def numbers(self, kind: str, seed: int, lengths: list[int]) -> dict[str, float]:
        """What a validation of rows would log."""
        rows, plan = range(ROWS * seed, ROWS * seed + ROWS), self.source.plan
        sampling = {"num_steps": 10, "shift": 5.0, "guidance": 1.0, "first_frame_clean": False}
        (teacher,) = self.seen(rv.teacher_maker(self.teacher, SHORT, seed=seed, **sampling), rows, [SHORT])

        def make(row: rv.VideoRow) -> Tensor:
            denoiser = Denoiser(self.student) if kind == "healthy" else Broken(self.student, kind)
            return rv.student_maker(denoiser, plan, lengths[-1], seed=seed)(row)

        found: dict[str, float] = {}
        for videos, start in zip(self.seen(make, rows, lengths, plan), ("", "long_")):
            own, theirs = ([video.measured for video in part] for part in (videos, teacher))
            both = rv.means(own) | rv.against(own, theirs)
            found |= {f"validation/{start}{name}": value for name, value in both.items()}
        return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    write_world(root, WorldConfig(num_worlds=ROWS * SEEDS, num_frames=9, seed=11, formats=["images"]))
    source = Source.of_model("toy")
    reading = RowReader(root / "images", ROWS * SEEDS, Mesh()).read(source)
    networks = [load_dit(path).eval().requires_grad_(False) for path in (source.weights, TOY_ASSETS / "teacher")]
    return Toy(source, *networks, reading.rows, reading.decoder)


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
