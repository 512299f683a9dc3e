"""Video clips: the folder format of mp4 files with captions, decoded with PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longtake.data.images import fit_pixels
from longtake.data.samples import FileSize, Sample, load_metadata
from longtake.errors import DataError


class ClipFolder:
    """A folder of videos with `metadata.jsonl` (`file_name`, `text`); a row is the first `num_frames` frames.

    With `fps`, the frames nearest to the times 0, 1/fps, 2/fps, ... are taken, so that motion keeps its real speed;
    without it every stored frame counts as one.
    """

    def __init__(self, path: Path, num_frames: int, size: FileSize | None = None, fps: float | None = None) -> None:
        self.path = path
        self.num_frames = num_frames
        self.size = size
        self.fps = fps
        self._rows = load_metadata(path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        file_name, prompt = self._rows[row].check()
        where = f"{self._rows[row].where}: clip {self.path / file_name}"
        video = read_clip(self.path / file_name, self.num_frames, size=self.size, fps=self.fps, where=where)
        return Sample(name=Path(file_name).stem, prompt=prompt, image=video[0], video=video)


def read_clip(
    file: Path, num_frames: int, *, size: FileSize | None = None, fps: float | None = None, where: str | None = None
) -> NDArray[np.uint8]:
    """The first `num_frames` frames of a video as uint8 [num_frames, h, w, 3], fitted to `size`.

    Raises: DataError naming `where` when the file is missing, damaged, too short, or changes its size.
    """
    import av

    where = where or str(file)
    if not file.is_file():
        raise DataError(f"{where} does not exist")
    try:
        # One thread: clips are already read in parallel, and a loader must not outnumber the cores.
        frames = [fit_pixels(pixels, size) for pixels in _pick_frames(file, num_frames, fps)]
    except (av.FFmpegError, ValueError) as error:
        raise DataError(f"{where} cannot be decoded ({error})") from error
    if len(frames) < num_frames:
        rate = f" at {fps:g} frames a second" if fps else ""
        raise DataError(
            f"{where} has {len(frames)} frames{rate} and {num_frames} are needed; remove it or cut it longer"
        )
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{where} changes its picture size on the way; set height and width")
    return np.stack(frames)


def _pick_frames(file: Path, num_frames: int, fps: float | None) -> Iterator[NDArray[np.uint8]]:
    """Yields at most `num_frames` decoded frames, one a tick of `fps`: the one shown nearest to the tick."""
    import av

    with av.open(str(file)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        half = float(1 / stream.average_rate) / 2 if stream.average_rate else 0.0
        start: float | None = None
        taken = 0
        for frame in container.decode(stream):
            if fps is None:
                repeats = 1
            else:
                if frame.time is None:
                    raise ValueError("its frames carry no time stamps")
                time = frame.time
                start = time if start is None else start
                # The frame is the nearest one to every tick before the middle between it and the next frame.
                repeats = max(0, int(np.ceil((time - start + half) * fps - 1e-6)) - taken)
            if repeats:
                pixels = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
                # Telephones store portrait videos lying down, with the turn beside them.
                pixels = np.rot90(pixels, round(frame.rotation / 90) % 4)
                for _ in range(min(repeats, num_frames - taken)):
                    yield pixels
                taken += repeats
            if taken >= num_frames:
                return
