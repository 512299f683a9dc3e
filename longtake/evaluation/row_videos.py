"""Videos of any rows, made by a student or by bidirectional weights, then decoded, measured and kept as files.

Rows are pictures, prompts or an encoded set; nobody knows a truth of them. What makes the videos is what streams and
samples elsewhere, what is measured is `instruments.measure`. A row is a batch of its own, so that rows of any size go
together and a video does not depend on the others. Must know no training.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from longtake.condition import Condition, pixel_frames
from longtake.data.loader import collate
from longtake.data.order import Pick
from longtake.data.samples import Dataset
from longtake.encoders.sessions import Decoder
from longtake.encodings.encode import RowEncoder, make_batch
from longtake.errors import DataError
from longtake.evaluation.instruments import METRICS, Blocks, Measured, ends, measure_beginnings
from longtake.evaluation.pictures import Strip, frame_numbers
from longtake.inference.frames import to_frames
from longtake.inference.sampling import student_latents, teacher_latents
from longtake.inference.video_io import VideoWriter
from longtake.models.dit import VideoDiT
from longtake.outputs import writing
from longtake.plan import StreamPlan
from longtake.rollout.denoise import Denoiser
from longtake.weights.tensor_files import save_tensors

if TYPE_CHECKING:
    from longtake.objectives.batch import EncodedBatch

DEFECTS = ("fade", "blur", "freeze", "seam", "loop", "uniform")  # by which `instruments` names what is broken
_SHOWN_SIDE = 160  # pixels of the longer side of a frame that is kept for a contact sheet
_LOOKS = ("saturation", "contrast", "brightness", "sharpness")  # curves whose ends are compared with the teacher's
LATENTS_AT_ONCE = 8  # decoded together: pixels of a long video are many


@dataclass(frozen=True, eq=False)
class VideoRow:
    """A row to make videos of, a batch of one.

    Fields: `number` in its data set, which keys the noise; `name`; `empty_text` [1, M, text_dim] of the unconditional
    side; `first_latent` [1, 1, C, H, W], the given picture, None where there is none; `size` (H, W) of the latents;
    `later`, the condition under the row's second prompt, None without one; `prompts`, all that are known of the row.
    """

    number: int
    name: str
    condition: Condition
    empty_text: Tensor
    first_latent: Tensor | None
    size: tuple[int, int]
    later: Condition | None = None
    prompts: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name and prompts, for people."""
        prompts = "; then: ".join(filter(None, self.prompts))
        return f"{self.name}: {prompts}" if prompts else self.name

    @property
    def identity(self) -> str:
        """A digest of all that videos of it depend on."""
        condition, digest = self.condition, hashlib.sha256(f"{self.number} {self.size}".encode())
        for tensor in (condition.text, condition.image, condition.frames, self.empty_text, self.first_latent):
            if tensor is not None:
                digest.update(f" {tuple(tensor.shape)} ".encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()


Maker = Callable[[VideoRow], Tensor]


def read_rows(dataset: Dataset, encoder: RowEncoder, numbers: Iterable[int]) -> list[VideoRow]:
    """Rows of a data set by their numbers, encoded. Raises: DataError for a row that cannot be used."""
    return [_read(dataset, encoder, number) for number in numbers]


def _read(dataset: Dataset, encoder: RowEncoder, number: int) -> VideoRow:
    sample = dataset[number]
    contents = [name for name in encoder.contents if name in ("clip", "y", "first")]
    contents += ["text_1"] * (len(sample.prompts) > 1)
    reading = encoder.reading(contents)
    reading.check(sample)
    rows = reading.rows(collate([sample], [Pick(number, number)], [number]))
    return row_of(make_batch(reading, rows, [number]), number, sample.name, sample.prompts)


def row_of(batch: EncodedBatch, number: int, name: str, prompts: tuple[str, ...] = ()) -> VideoRow:
    """The row of a batch of one."""
    first, condition = batch.first_latent, batch.condition
    size = batch.latent_size if first is None else (first.shape[3], first.shape[4])
    later = None if batch.later_text is None else condition.with_text(batch.later_text)
    return VideoRow(number, name, condition, batch.empty_text, first, size, later, prompts)


def student_maker(
    denoiser: Denoiser, plan: StreamPlan, num_latent_frames: int, *, seed: int, switch_frame: int | None = None
) -> Maker:
    """Latents [1, F, C, H, W] streamed by causal weights; from `switch_frame` on under the second prompt of the row."""

    def make(row: VideoRow) -> Tensor:
        switch: dict[str, Any] = {}
        if switch_frame is not None and row.later is not None:
            switch = {"later": [row.later], "switch_frames": [switch_frame]}
        begin, sizes = (row.condition, row.first_latent), (num_latent_frames, row.size)
        return student_latents(denoiser, *begin, plan, *sizes, seed=seed, videos=[row.number], **switch)

    return make


def teacher_maker(model: VideoDiT, num_latent_frames: int, *, first_frame_clean: bool, **sampling: Any) -> Maker:
    """Latents of whole clips by bidirectional weights; `sampling`: `seed`, `num_steps`, `shift` and `guidance`."""

    def make(row: VideoRow) -> Tensor:
        first = row.first_latent if first_frame_clean else None
        sizes = num_latent_frames, row.size
        return teacher_latents(
            model, row.condition, row.empty_text, *sizes, videos=[row.number], first_latent=first, **sampling
        )

    return make


def decoded(decoder: Decoder, latents: Tensor) -> Iterator[NDArray[np.uint8]]:
    """Yields the frames of one video, uint8 [T, h, w, 3], a piece at a time. Raises: DataError if any is not finite."""
    session, first = decoder.decoder_session(), 0
    for piece in latents.split(LATENTS_AT_ONCE, dim=1):
        frames = to_frames(session.decode(piece)[0], first)
        first += len(frames)
        yield frames


def blocks_of(plan: StreamPlan, num_latent_frames: int, temporal_stride: int) -> Blocks | None:
    """Where the blocks of a student's video begin, in pixel frames, for the seam score; None where there is one alone.

    The given picture is no block of its own there: its one frame belongs to the block after it.
    """
    starts = [start for start, _ in plan.blocks(0, num_latent_frames) if start > 1]
    if not starts or plan.block_frames * temporal_stride < 2:
        return None
    return Blocks(plan.block_frames * temporal_stride, pixel_frames(starts[0], temporal_stride))


@dataclass(frozen=True, eq=False)
class SeenVideo:
    """What is known of a video when its frames are gone: measures, and some small frames."""

    name: str
    measured: Measured
    shown: Strip


@dataclass(frozen=True)
class Cut:
    """A beginning of a video that is looked at: so many frames, where its blocks begin, and the file it goes to."""

    num_frames: int
    blocks: Blocks | None = None
    file: Path | None = None


def look(name: str, frames: Iterable[NDArray[np.uint8]], fps: float, cuts: Sequence[Cut]) -> list[SeenVideo]:
    """Measures beginnings of a video as its frames come, uint8 [T, h, w, 3] a piece, and writes them to their files.

    Raises: DataError, also for a video that is shorter than the longest of them; OutputError.
    """
    wanted = [frame_numbers(cut.num_frames) for cut in cuts]
    shown: list[list[NDArray[np.uint8]]] = [[] for _ in cuts]
    pieces = iter(frames)
    first = next(pieces, None)
    if first is None:
        raise DataError(f"the video of {name} has no frame")

    def each(writers: Sequence[tuple[Cut, VideoWriter]]) -> Iterator[NDArray[np.uint8]]:
        number = 0
        for piece in chain([first], pieces):
            for cut, writer in writers:
                if number < cut.num_frames:
                    writer.write(piece[: cut.num_frames - number])
            for frame in piece:
                for kept, numbers in zip(shown, wanted):
                    if number in numbers:
                        kept.append(_small(frame))
                number += 1
                yield frame

    with ExitStack() as stack:
        writers = []
        for cut in cuts:
            if cut.file is not None:
                cut.file.parent.mkdir(parents=True, exist_ok=True)
                writer = VideoWriter(cut.file, fps, *first.shape[1:3], keep=False)
                writers.append((cut, stack.enter_context(writer)))
        measured = measure_beginnings(each(writers), fps, {cut.num_frames: cut.blocks for cut in cuts})
    strips = (Strip(np.stack(kept), numbers) for kept, numbers in zip(shown, wanted))
    return [SeenVideo(name, measured[cut.num_frames], strip) for cut, strip in zip(cuts, strips)]


def _small(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = frame.shape[:2]
    scale = _SHOWN_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8) if scale < 1 else frame.copy()


# ---- numbers over several videos -----------------------------------------------------------------------------------
def means(videos: Sequence[Measured]) -> dict[str, float]:
    """The mean of each of METRICS, NaN where no video has it, and `defect_NAME`: the share of videos that have it."""
    found = {name: _mean([video.metrics[name] for video in videos]) for name in METRICS}
    return found | {f"defect_{name}": float(np.mean([name in video.defects for video in videos])) for name in DEFECTS}


def against(own: Sequence[Measured], teacher: Sequence[Measured]) -> dict[str, float]:
    """How videos compare with those that the teacher made of the same rows; 1 is the same.

    `motion_vs_teacher`: mean motion over the teacher's (NaN where the teacher's stand still); `saturation_vs_teacher`
    and so on: means of the last 15 % of the frames over those of the teacher's, since what fades or burns out does so
    in time; `distance_to_teacher`: the mean of |log| of the ratios of motion, saturation, contrast and sharpness.
    """
    ratios = {"motion": _ratio(*(_mean([v.metrics["motion_px_s"] for v in part]) for part in (own, teacher)))}
    for name in _LOOKS:
        ratios[name] = _ratio(*(_mean([_last(video, name) for video in part]) for part in (own, teacher)))
    compared = [ratios[name] for name in ("motion", "saturation", "contrast", "sharpness")]
    known = [abs(math.log(max(ratio, 1e-3))) for ratio in compared if math.isfinite(ratio)]
    found = {f"{name}_vs_teacher": ratio for name, ratio in ratios.items()}
    return found | {"distance_to_teacher": float(np.mean(known)) if known else math.nan}


def mean_curves(videos: Sequence[Measured]) -> dict[str, list[float | None]]:
    """The curves of videos of one length, frame by frame their means; None where no video has a value."""
    found: dict[str, list[float | None]] = {}
    for name in videos[0].curves:
        columns = zip(*(video.curves[name] for video in videos))
        known = ([value for value in column if value is not None] for column in columns)
        found[name] = [float(np.mean(values)) if values else None for values in known]
    return found


def _last(video: Measured, curve: str) -> float:
    return float(ends(np.array(video.curves[curve], float))[1].mean())


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def _ratio(own: float, teacher: float) -> float:
    return own / teacher if teacher > 1e-6 else math.nan


# ---- latents on disk, by what made them ----------------------------------------------------------------------------
class KeptLatents:
    """Latents that were made before, in a folder: one file a row, named after everything that they depend on.

    Args: `made_by`, what made them beside the row: identity of the weights, seed, steps, sizes and so on.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, Any]) -> None:
        self.folder, self._made_by = folder, json.dumps(made_by, sort_keys=True)

    def file(self, row: VideoRow) -> Path:
        """Where the latents of a row are kept."""
        return self.folder / f"{hashlib.sha256((self._made_by + row.identity).encode()).hexdigest()[:32]}.safetensors"

    def get(self, row: VideoRow) -> Tensor | None:
        """Those of a row on the CPU, None where they are not there or cannot be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file(row), "pt") as stored:
                return stored.get_tensor("latents")
        except (OSError, SafetensorError):
            return None

    def put(self, row: VideoRow, latents: Tensor) -> None:
        """Keeps them; whoever reads sees a whole file or none. Raises: OutputError."""
        file = self.file(row)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        about = {"made_by": self._made_by, "row": row.name}
        save_tensors({"latents": latents.detach().cpu().contiguous()}, file, about)
