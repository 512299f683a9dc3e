"""A new data format is a file with one class and a line in `formats.py`; here both stand in a test, and it is trained."""

import pytest
import yaml
from format_files import encode, pixels
from tiny_stage import stage_tree
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.formats import FORMATS
from longtake.data.formats import detect_kind, open_dataset
from longtake.data.rows import AS_STORED, Picture, Rows
from longtake.errors import ConfigError, DataError
from longtake.train.metrics import read_rows


class Album(Rows):
    """Rows of a folder with `album.txt`: a line `file | prompt` each."""

    LAYOUT = "album.txt with a line `file | prompt` a row"

    def __init__(self, path, spec=AS_STORED):
        super().__init__(path, spec)
        self._rows = [line.split(" | ") for line in (path / "album.txt").read_text().splitlines()]

    @classmethod
    def lies_at(cls, path):
        return (path / "album.txt").is_file()

    def __len__(self):
        return len(self._rows)

    def identities(self):
        return map(repr, self._rows)

    def place(self, row):
        return self._rows[row][0], f"{self.path}/album.txt row {row}"

    def prompts(self, row):
        return (self._rows[row][1],)

    def picture(self, row):
        name, where = self.place(row)
        return Picture(self.path / name, f"{where}: {name}")


@pytest.fixture
def album(tmp_path, monkeypatch):
    """Four pictures and one that is missing; texts, which are tried last, are found in the folder too."""
    for place in ("longtake.config.formats", "longtake.data.formats"):
        monkeypatch.setattr(f"{place}.FORMATS", {"album": f"{__name__}:Album", **FORMATS})
    folder = tmp_path / "album"
    folder.mkdir()
    for row in range(4):
        (folder / f"{row}.png").write_bytes(encode(pixels(row, 70, 80)))
    (folder / "album.txt").write_text("".join(f"{row}.png | a red circle moves up\n" for row in range(5)))
    return folder


def test_it_is_recognised_opened_and_told_of(album, tmp_path):
    assert detect_kind(album) == "album"
    dataset = open_dataset(album, height=64, width=64)
    assert len(dataset) == 5 and dataset[3].image.shape == (64, 64, 3) and dataset.pixel_size(0) == (70, 80)
    assert dataset[1].prompt == "a red circle moves up" and dataset[1].video is None
    with pytest.raises(DataError, match="album.txt row 4: 4.png cannot be read"):
        dataset[4]
    with pytest.raises(DataError, match="album.txt is a file, and data.kind=album needs a folder"):
        open_dataset(album / "album.txt", kind="album")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"(?s)album .*album.txt with a line .*webdataset"):
        open_dataset(tmp_path / "empty")
    with pytest.raises(ConfigError, match="'albums' is no data format; give auto or one of album, encoded"):
        open_dataset(album, kind="albums")


@pytest.mark.parametrize("kind", ["auto", "album"])
def test_it_is_trained_by_name_or_unnamed(album, workshop, tmp_path, kind):
    data = {"path": str(album), "kind": kind, "num_workers": 0, "on_bad_row": "skip", "max_bad_share": 0.2}
    changes = {"data": data, "max_steps": 2, "save_every": 0}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(stage_tree(workshop, tmp_path, "distill", **changes)))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "stage.yaml")])
    assert result.exit_code == 0, result.output
    rows = read_rows(tmp_path / "distill" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1] and all(row["critic_loss"] > 0 for row in rows)
