"""Many videos: pairs of picture and prompt from a folder or a JSON-lines file, or prompts alone, several seeds each,
shared over ranks.

Each video is a function of its pair, its seed and the rules alone, so neither the number of ranks nor a restart changes
it. Beside `name.mp4` lie `name.json` with what was asked for, whose finished video is not made again, and the caption
`name.txt`, which makes the folder a data set of clips.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from longtake.config.base import Settings
from longtake.config.generation import MAX_FRAMES, GenerationConfig, frames_of
from longtake.data.file_rows import (
    FILE_KEYS,
    FileRow,
    files_below,
    list_files,
    read_objects,
    table_of,
    text_rows,
    visible_files,
)
from longtake.data.samples import IMAGE_SUFFIXES
from longtake.errors import ConfigError, DataError
from longtake.inference.containers import SUFFIXES
from longtake.inference.generator import GenerationReport, Generator, Source, write_chunks
from longtake.inference.pipeline import check_request
from longtake.inference.record import PLAIN, Asked, Writing, check_space_for, sidecar
from longtake.json_text import parse_json
from longtake.outputs import check_output_file, check_output_folder, write_whole
from longtake.progress import track

if TYPE_CHECKING:
    from longtake.parallel.mesh import Mesh

MAX_VIDEOS = 1_000_000  # of one start

logger = logging.getLogger(__name__)


class RowValues(Settings):
    """What a row of a table may say of its video beside picture and prompt; it wins over the command's."""

    seed: int | None = Field(default=None, ge=0, lt=2**63, description="the first seed of the row")
    seconds: float | None = Field(default=None, gt=0, le=MAX_FRAMES, description="length")
    negative: str | None = Field(default=None, description="what should not happen; needs guidance")
    guidance: float | None = Field(default=None, ge=0, description="classifier-free guidance; 1 = off")


@dataclass(frozen=True)
class Pair:
    """A picture (or None) and a prompt; `name` is that of the output, `where` names the pair in errors.

    `problem` says why it cannot be used, if so; `values` are those of its row.
    """

    name: str
    where: str
    image: Path | None = None
    prompt: str = ""
    problem: str | None = None
    values: RowValues = RowValues()


@dataclass(frozen=True)
class _Task:
    """A video to make; `request`, all that its frames depend on, as the file beside it says it; `where`, for errors."""

    where: str
    output: Path
    request: dict[str, Any]


def check_apart(inputs: str | Path, folder: str | Path) -> None:
    """Raises ConfigError when `folder` lies in that of the inputs: its captions would be read as inputs next time."""
    if os.path.isdir(inputs) and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(inputs)):
        raise ConfigError(
            f"{folder} lies in the folder of the inputs, {inputs}, and the captions of its videos would be read as "
            "inputs; name a folder elsewhere"
        )


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs in `path`, unusable ones included (they carry their problem).

    A folder holds pictures with captions, and a file is a table of such, in any of the ways of `data/file_rows.py`; a
    table that names no file, a text file and a folder of text files alone hold prompts. Of several prompts the first is
    taken. Rows of a table may have the keys of `RowValues`.
    Raises: DataError when there is no pair at all, or for a key that nobody reads; ConfigError for a row's wrong value.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder of pictures and captions, or a JSON-lines file")
    keys = tuple(RowValues.model_fields)
    rows = text_rows(path, keys) if _holds_prompts_alone(path) else list_files(path, "images", keys)
    stems = [file.stem if (file := row.file or row.caption) else "row" for row in rows]
    # Files with captions of their own keep their names; rows of a table, and files of one name, are numbered.
    numbered = len(set(stems)) < len(stems) or any(row.caption is None and row.problem is None for row in rows)
    return [_pair(f"{k:05d}-{stem}" if numbered else stem, row) for k, (stem, row) in enumerate(zip(stems, rows))]


def _holds_prompts_alone(path: Path) -> bool:
    """Whether no row there has a picture: a folder of text files, a `.txt` of lines, a `.jsonl` that names no file."""
    if path.is_dir():
        return table_of(path) is None and not files_below(path, IMAGE_SUFFIXES) and bool(visible_files(path, ".txt"))
    objects = [entry for _, entry, problem in read_objects(path) if not problem]
    if not objects:
        return path.suffix.lower() == ".txt"
    return path.suffix.lower() == ".jsonl" and not any(key in entry for entry in objects for key in FILE_KEYS)


def _pair(name: str, row: FileRow) -> Pair:
    try:
        image, prompts = row.find_file() if row.file or row.problem else None, row.read_prompts()
    except DataError as error:
        return Pair(name, row.where, problem=str(error).removeprefix(f"{row.where}: "))
    if len(prompts) > 1:
        logger.warning("%s has %d prompts (lines of its caption); the first is taken", row.where, len(prompts))
    return Pair(name, row.where, image, prompts[0], values=_row_values(row))


def _row_values(row: FileRow) -> RowValues:
    """The values of a row; those of CSV are text. Raises: ConfigError that names the row."""

    def read(key: str, value: Any) -> Any:
        try:
            return value if key == "negative" or not isinstance(value, str) else parse_json(value.strip().encode())
        except ValueError:
            return value  # which is refused

    try:
        return RowValues.from_tree({key: read(key, value) for key, value in row.values.items()})
    except ConfigError as error:
        raise ConfigError(f"{row.where}: {error}") from None


def generate_many(
    source: Source,
    pairs: Sequence[Pair],
    folder: str | Path,
    *,
    mesh: Mesh,
    samples: int = 1,
    seed: int = 0,
    num_frames: int | None = None,
    seconds: float | None = None,
    negative: str | None = None,
    overwrite: bool = False,
    writing: Writing = PLAIN,
    report: Callable[[str], None] = logger.info,
) -> list[GenerationReport]:
    """Writes `folder/NAME-seedS.mp4` for every pair and each of the seeds `seed` .. `seed + samples - 1`.

    Each is `num_frames` or `seconds` long, or (neither) as long as the training clips. Of the videos that are not there
    yet, each rank (with `mesh.sequence` each group of ranks together) makes its share. All ranks call it. `report` gets
    a line after each video. `overwrite` makes videos again that are there already and were asked for otherwise;
    `writing`, how they are written. What a row says (`RowValues`) wins; its seeds begin with its own.
    Raises: DataError on every rank, after all good pairs, naming the bad ones; ConfigError before any work; OutputError
    at once when a file cannot be written.
    """
    folder, settings = Path(folder), source.settings
    if not 1 <= samples <= MAX_VIDEOS // max(1, len(pairs)):
        raise ConfigError(f"samples={samples} must be at least 1, and with all pictures {MAX_VIDEOS} videos at most")
    frames_of(num_frames, seconds, settings.fps)
    if folder.suffix.lower() in SUFFIXES and not folder.is_dir():
        raise ConfigError(f"{folder} must be a folder, for there are several videos; leave {folder.suffix} out")
    asked = {
        "seed": seed,
        "negative": negative,
        "length": {"num_frames": num_frames, "seconds": seconds},
        "weights": str(source.weights),
        **_look(writing),
    }
    tasks = [task for pair in pairs if pair.problem is None for task in _tasks(pair, asked, settings, folder, samples)]

    def prepare() -> list[int]:
        left = _unfinished(folder, tasks, overwrite=overwrite)
        lengths = (frames_of(**tasks[number].request["length"], fps=settings.fps) for number in left)
        frames = sum(length or settings.num_latent_frames * 4 for length in lengths)
        check_space_for(folder / "videos.mp4", settings, frames, writing)
        return left

    waiting = mesh.on_main(prepare)
    reports, problems = _make_share(
        [tasks[k] for k in waiting[mesh.data_rank :: mesh.num_data_ranks]], source, mesh, report, writing
    )
    if mesh.is_main:
        problems = [*(f"{pair.where}: {pair.problem}" for pair in pairs if pair.problem is not None), *problems]
    # Every rank waits here: a launcher would end the others as soon as one of them fails.
    found = list(dict.fromkeys(problem for part in mesh.every(lambda: problems) for problem in part))
    if found:
        raise DataError(f"bad pairs ({len(found)}; all others are done):\n" + "\n".join(found))
    return reports


def _tasks(
    pair: Pair, asked: Mapping[str, Any], settings: GenerationConfig, folder: Path, samples: int
) -> Iterator[_Task]:
    """The videos of a pair; `asked`, of all. Raises: ConfigError for what cannot be made; it names the row."""
    said = pair.values.model_dump(exclude_none=True)
    guidance = said.pop("guidance", settings.guidance)
    settings = settings.model_copy(update={"guidance": guidance})
    if (seconds := said.pop("seconds", None)) is not None:
        said["length"] = {"num_frames": None, "seconds": seconds}
    now = {**asked, **said}
    try:
        for number in (now["seed"], now["seed"] + samples):
            check_request(guidance, number, now["negative"])
        frames_of(**now["length"], fps=settings.fps)
    except ConfigError as error:
        raise ConfigError(f"{pair.where}: {error}" if said else str(error)) from None
    now |= {"image": None if pair.image is None else str(pair.image), "prompt": pair.prompt}
    now["settings"] = settings.model_dump(exclude={"encoders"})
    for number in range(now["seed"], now["seed"] + samples):
        yield _Task(pair.where, folder / f"{pair.name}-seed{number}.mp4", {**now, "seed": number})


def _unfinished(folder: Path, tasks: Sequence[_Task], *, overwrite: bool) -> list[int]:
    """The numbers of the tasks whose videos are not there yet. Raises: as `_is_finished`; OutputError."""
    check_output_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tasks:  # the longest name stands for all
        check_output_file(max((task.output for task in tasks), key=lambda path: len(bytes(path))), overwrite=True)
    waiting = [number for number, task in enumerate(tasks) if not _is_finished(task, overwrite=overwrite)]
    if len(waiting) < len(tasks):
        logger.info("%d of %d videos are finished already", len(tasks) - len(waiting), len(tasks))
    return waiting


def _make_share(
    tasks: Sequence[_Task], source: Source, mesh: Mesh, report: Callable[[str], None], writing: Writing
) -> tuple[list[GenerationReport], list[str]]:
    """Makes the videos of this rank, or of its group; their reports (of the rank that speaks for the group), and what
    is wrong with pictures that cannot be read.
    """
    reports: list[GenerationReport] = []
    problems: list[str] = []
    generator = Generator.build(source, mesh.device, split=mesh.sequence) if tasks else None
    for task in track(tasks, "videos", "videos"):
        assert generator is not None
        asked = task.request
        given = asked["image"] is not None
        generator = generator.guided(asked["settings"]["guidance"])
        try:
            generator.beginning.check(given=given)
            if given:
                generator.prepare(asked["image"])
        except (ConfigError, DataError) as error:  # this pair alone, on all ranks that would make it; named at the end
            logger.error("%s: %s", task.where, error)
            problems.append(f"{task.where}: {error}")
            continue
        note = generator.beginning.zero_shot(given=given)
        record = asked if note is None else {**asked, "note": note}
        if mesh.leads_sequence:
            write_whole(sidecar(task.output), json.dumps(record, indent=2) + "\n")
            write_whole(caption(task.output), asked["prompt"] + "\n")
        rest = {
            "seed": asked["seed"],
            "negative": asked["negative"],
            "num_frames": generator.length(**asked["length"]),
        }
        chunks = generator.stream(asked["image"], asked["prompt"], **rest, ahead=generator.is_ahead)
        shown = Asked(asked["prompt"], asked["seed"], asked["image"], asked["negative"], beside=record)
        how: dict[str, Any] = {"asked": shown, "writing": writing, "num_frames": rest["num_frames"]}
        made = write_chunks(generator, chunks, task.output, given=given, keep=False, **how)
        if mesh.leads_sequence:
            reports.append(made)
            report(str(made))
    return reports, problems


def _look(writing: Writing) -> dict[str, Any]:
    """What of `writing` a request holds; folders of earlier versions have no such key, and the default."""
    return {"video": {"crf": writing.crf, "scale": writing.scale}}


def caption(output: Path) -> Path:
    """The file beside a video that holds its prompt."""
    return output.with_suffix(".txt")


def _is_finished(task: _Task, *, overwrite: bool) -> bool:
    """True when the video is there; it appears under its name only when complete.

    Raises: DataError when what is there was made from another request, or by something else; with `overwrite` no other
    request is.
    """
    output, file = task.output, sidecar(task.output)
    there = [path for path in (output, file, caption(output)) if os.path.lexists(path)]
    if not there:
        return False
    try:
        before = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{there[0]} exists and {file.name} does not say how it was made ({error}); move it, or give another folder"
        ) from error
    now = json.loads(json.dumps(task.request))
    before = {**_look(PLAIN), **before} if isinstance(before, dict) else None
    if before is None or not before.keys() >= now.keys():
        raise DataError(f"{file} exists and is nothing that was made here; move it, or give another folder")
    changed = sorted(key for key in now if before[key] != now[key])
    if output in there and changed and not overwrite:
        raise DataError(
            f"{output} was made with other values of {', '.join(changed)}; give another folder, remove it, or give "
            "--overwrite to make it again"
        )
    return output in there and not changed
