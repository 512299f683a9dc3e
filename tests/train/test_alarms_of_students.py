"""Alarms over videos of the packaged student as it is, and broken on purpose: what a validation would say of it; and
alarms of short trainings.
"""

import json
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor
from typer.testing import CliRunner

from longtake.cli.app import app
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


@pytest.mark.whole
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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    world = WorldConfig(num_worlds=64, num_frames=9, formats=["images"])
    return write_world(tmp_path_factory.mktemp("world"), world) / "images"


def trained(pictures, folder, start, seed, *changes):
    """The alarms of `toy/distill` from weights of the package: (step, alarm)."""
    words = ["train", "configs/toy/distill.yaml", f"init_from={TOY_ASSETS / start}", f"logdir={folder}"]
    words += [f"data.path={pictures}", f"seed={seed}", f"validation.seed={1000 + seed}", f"validation.num_rows={ROWS}"]
    words += ["validation.max_share=1", "validation.teacher_steps=10", "save_every=0", *changes]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (folder / "distill/metrics.jsonl").read_text().splitlines()]
    errors = [row["validation/errors"] for row in rows if "validation/errors" in row]
    assert errors == [0, 0, 0]
    file = folder / "distill/alarms.jsonl"
    raised = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    return {(row["step"], row["alarm"]) for row in raised}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, SEEDS + 1))
def test_trainings_of_five_seeds_from_the_causal_initialisation_raise_none(pictures, tmp_path, seed):
    assert trained(pictures, tmp_path, "causal", seed, "max_steps=20", "validate_every=10") == set()


@pytest.mark.slow
def test_a_student_distilled_from_bidirectional_weights_is_called_frozen_in_its_second_validation(pictures, tmp_path):
    """It moves half as far as it should at four times the length (docs/log.md)."""
    raised = trained(pictures, tmp_path, "teacher", 2, "max_steps=10", "validate_every=5")
    assert (10, "motion") in raised and min(step for step, _ in raised) == 10
