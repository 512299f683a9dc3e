"""The examples: the picture is one of the toy world, the script is valid, the notebook runs from end to end."""

import base64
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from longtake.inference.script import read_story
from longtake.inference.source import Source
from longtake.inference.video_io import read_video

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_script_is_valid_and_the_picture_small():
    story = read_story(EXAMPLES / "story.yaml", Source.of_model("toy").settings)
    assert [cue.frame for cue in story.cues] == [32, 64] and story.num_frames == 96
    assert Image.open(EXAMPLES / "first_frame.png").size == (64, 64)
    assert sum(path.stat().st_size for path in EXAMPLES.iterdir()) < 30_000  # a notebook is kept without its outputs


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_notebook_runs_and_shows_its_videos(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))  # of the kernel, a process of its own
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(EXAMPLES / "first_frame.png", tmp_path)
    notebook = nbformat.read(EXAMPLES / "stream.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    videos = []
    for output in outputs:
        for data in re.findall(r"data:video/mp4;base64,([^\"]+)", output.get("data", {}).get("text/html", "")):
            (tmp_path / "shown.mp4").write_bytes(base64.b64decode(data))
            videos.append(len(read_video(tmp_path / "shown.mp4")[0]))
    assert videos == [32, 65, 64]
    assert len(read_video(tmp_path / "out.mp4")[0]) == 32
    assert "did you mean prompt?" in outputs[-1]["text"]
    assert sum(len(str(output)) for output in outputs) < 1_000_000
