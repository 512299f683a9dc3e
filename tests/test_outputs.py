"""Outputs: checked before any work, never an input, never overwritten unasked; what a disk refuses is one message."""

import errno
import os
import resource

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.cli.common import _told
from longtake.errors import ConfigError, OutputError
from longtake.inference.video_io import VideoWriter, read_video
from longtake.lock import locked
from longtake.outputs import check_new_folder, check_output_file, check_output_folder, free_name, write_whole, writing
from longtake.weights.tensor_files import save_tensors


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (64, 64), (200, 60, 30)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def invoke(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(message, *words):
    result = invoke(*words)
    assert result.exit_code and message in result.output, result.output


# ---- what is checked -------------------------------------------------------------------------------------------------
def test_a_file_is_checked_before_it_is_written(tmp_path, photo):
    assert check_output_file(tmp_path / "new.mp4", suffixes=[".mp4"], inputs=[photo, None]) == tmp_path / "new.mp4"
    (tmp_path / "link.mp4").symlink_to(photo)
    (tmp_path / "hard.mp4").hardlink_to(photo)
    for name in ("photo.png", "link.mp4", "hard.mp4", "../" + tmp_path.name + "/photo.png"):
        with pytest.raises(ConfigError, match="is in use"):
            check_output_file(tmp_path / name, inputs=[photo], overwrite=True)
    with pytest.raises(ConfigError, match=r"a\.avi must end in \.mp4, .*call it .*a\.mp4"):
        check_output_file(tmp_path / "a.avi", suffixes=[".mp4"])
    with pytest.raises(ConfigError, match="photo.png exists already; .*--overwrite"):
        check_output_file(photo)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="exists already"):
        check_output_file(tmp_path / "dangling")
    wrong = {
        tmp_path: "is a folder",
        tmp_path / "no" / "a.mp4": "No such file or directory; its folder does not exist; create it first",
        photo / "a.mp4": "Not a directory",
        tmp_path / ("n" * 250): "File name too long; give a shorter name",
        "/proc/a.mp4": "cannot be written",
    }
    for path, message in wrong.items():
        with pytest.raises(OutputError, match=message):
            check_output_file(path, overwrite=True)
    check_output_file(photo, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "hard.mp4", "link.mp4", "photo.png"]


def test_a_folder_is_checked_and_nothing_stays(tmp_path, photo):
    check_output_folder(tmp_path / "a" / "b")
    for path, message in (
        (photo, "is a file"),
        (photo / "x" / "y", "Not a directory"),
        (tmp_path / ("n" * 300), "long"),
    ):
        with pytest.raises(OutputError, match=message):
            check_output_folder(path)
    assert os.listdir(tmp_path) == ["photo.png"]
    own = ["*.safetensors"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a.safetensors").touch()
    with pytest.raises(ConfigError, match="old exists already"):
        check_new_folder(tmp_path / "old", own=own)
    check_new_folder(tmp_path / "old", own=own, overwrite=True)
    with pytest.raises(ConfigError, match="also holds old/a.safetensors, photo.png"):
        check_new_folder(tmp_path, own=own, overwrite=True)
    with pytest.raises(ConfigError, match="is in use"):
        check_new_folder(tmp_path / "old", own=own, inputs=[tmp_path / "old" / "a.safetensors"], overwrite=True)
    assert free_name(tmp_path / "new") == tmp_path / "new" and free_name(photo) == tmp_path / "photo-2.png"


# ---- what a disk says ------------------------------------------------------------------------------------------------
def test_a_disk_that_refuses_the_clearing_up_too_is_told_of_once(tmp_path, photo, monkeypatch):
    for path, message in ((photo / "a.json", "Not a directory; "), (tmp_path / ("n" * 250), "File name too long; ")):
        with pytest.raises(OutputError, match=f"{path} cannot be written: {message}"):
            write_whole(path, "text")

    def refuse(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patched, pytest.raises(OutputError, match="weights cannot be written"):
        patched.setattr("pathlib.Path.unlink", refuse)
        with locked(tmp_path / "run", "x"):
            raise OutputError("weights cannot be written: Read-only file system")
    with locked(tmp_path / "run", "x"):  # let go all the same
        assert (tmp_path / "run" / ".lock").is_file()


def test_words_of_libraries_are_understood(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OutputError, match=r"a\.safetensors cannot be written: File too large"):
            save_tensors({"a": torch.zeros(10_000)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(OutputError, match="x cannot be written: No space left"), writing("x"):
        raise RuntimeError("x: No space left on device")
    with pytest.raises(KeyError), writing("x"):
        raise KeyError("a bug stays one")
    assert _told(OSError(errno.EROFS, "Read-only file system", "f")) == (
        "f: Read-only file system; name a folder that can be written"
    )
    for full in (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 7 bytes"),
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),  # no room for a context
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
    ):
        assert str(_told(full)).startswith("Not enough memory (") and "\n" not in str(_told(full))
    assert _told(ValueError("a bug")) is None and _told(BrokenPipeError(errno.EPIPE, "pipe")) is None


# ---- the commands ----------------------------------------------------------------------------------------------------
def test_generate_keeps_its_inputs(tmp_path, photo):
    story = tmp_path / "story.yaml"
    story.write_text("image: photo.png\nprompt: a red circle climbs\nframes: 5\n")
    before = photo.read_bytes(), story.read_bytes()
    toy = ("generate", "--model", "toy")
    one = (*toy, "--image", photo, "--prompt", "a red circle climbs", "--frames", 5)
    refused("must end in .mp4", *one, "-o", photo)
    refused("must end in .mp4", *toy, "--script", story, "-o", story)
    (tmp_path / "photo.mp4").symlink_to(photo)
    refused("is in use", *one, "-o", tmp_path / "photo.mp4", "--overwrite")
    refused("is in use", *toy, "--script", story, "-o", tmp_path / "photo.mp4", "--overwrite")
    refused("lies in the folder of the inputs", *toy, "--inputs", tmp_path, "-o", tmp_path, "--frames", 5)
    refused("lies in the folder of the inputs", *toy, "--inputs", tmp_path, "-o", tmp_path / "a" / "b", "--frames", 5)
    refused("must be a folder", *one, "--samples", 2, "-o", tmp_path / "a.mp4")
    (tmp_path / "photo-seed0.txt").write_text("mine")
    refused("does not say how it was made", *one, "--samples", 1, "-o", tmp_path)
    assert (photo.read_bytes(), story.read_bytes()) == before and (tmp_path / "photo-seed0.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "options",
    [
        ["--seconds", "nan"], ["--seconds", "inf"], ["--seconds", "1e300"], ["--frames", 10**12], ["--frames", -1],
        ["--steps", 10**9], ["--steps", "nan"], ["--shift", "1e-300"], ["--guidance", "nan"], ["--guidance", "inf"],
        ["--height", 10**6], ["--width", -16], ["--fps", 10**6], ["--seed", -1], ["--seed", 2**63],
        ["--samples", 10**9], ["--window", "9" * 5000], ["--device", "gpu"], ["--device", "cuda:99"],
        ["--decode-device", "meta"], ["--prompt", "half \udce9"],
    ],
)  # fmt: skip
def test_values_without_sense_are_refused(tmp_path, photo, options):
    words = ["generate", "--model", "toy", "--image", photo, "--prompt", "a", "-o", tmp_path / "out"]
    words[-1] = words[-1] if options[0] == "--samples" else tmp_path / "out.mp4"
    result = invoke(*words, *options)
    assert result.exit_code == 2 and "ConfigError" in result.output, result.output
    assert os.listdir(tmp_path) == ["photo.png"]


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("text", ["", "two", "-1", "99999999"])
def test_an_environment_without_sense_is_refused(tmp_path, photo, monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    words = ["generate", "--model", "toy", "--image", photo, "--prompt", "a", "--frames", 5, "-o", tmp_path / "o.mp4"]
    refused(f"{name}={text!r} in the environment must be a whole number", *words)


def test_a_second_world_needs_to_be_asked_for(tmp_path):
    folder = tmp_path / "world"
    assert invoke("world", folder, "--num-worlds", 1, "--format", "images").exit_code == 0
    refused("--overwrite", "world", folder, "--num-worlds", 2, "--format", "images")
    assert invoke("world", folder, "--num-worlds", 2, "--format", "images", "--overwrite").exit_code == 0
    assert len(list((folder / "images").glob("*.png"))) == 2 and os.listdir(tmp_path) == ["world"]
    (folder / "mine").touch()
    refused("also holds mine", "world", folder, "--num-worlds", 3, "--overwrite")


def test_ctrl_c_is_one_line_and_keeps_the_frames(tmp_path, photo, monkeypatch):
    def interrupted(*_, **__):
        with VideoWriter(tmp_path / "o.mp4", 16, 48, 64) as writer:
            writer.write(np.zeros((3, 48, 64, 3), np.uint8))
            raise KeyboardInterrupt

    monkeypatch.setattr("longtake.inference.generator.generate_file", interrupted)
    result = invoke("generate", "--model", "toy", "--image", photo, "--prompt", "a", "-o", tmp_path / "o.mp4")
    assert result.exit_code == 130
    assert result.output == f"Interrupted; what was made until then is kept in {tmp_path / 'o.partial.mp4'}\n"
    assert len(read_video(tmp_path / "o.partial.mp4")[0]) == 3
