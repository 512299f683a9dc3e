"""What a file that should hold weights really is, told by its first bytes and not by its name. Must know no torch.

Source of the first bytes: huggingface/safetensors README (Format), ggml-org/ggml docs/gguf.md, git-lfs docs/spec.md,
RFC 1740 (AppleDouble).
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from longtake.errors import CheckpointError

_AGAIN = "download it again"
GGUF = (
    "is GGUF, whose quantised weights are not read; take the .safetensors of the same model, or make them: diffusers' "
    "WanTransformer3DModel.from_single_file with a GGUFQuantizationConfig, dequantize(), save_pretrained(FOLDER)"
)
_POINTER = b"version https://git-lfs"
_BEGINNINGS = {
    _POINTER: "is a Git LFS pointer, which stands for the weights; run `git lfs pull` in its "
    "repository, or get it with `hf download`",
    b"GGUF": GGUF,
    b"\x00\x05\x16\x07": "is an AppleDouble file, in which macOS keeps notes on the file of that name without `._`; "
    "give that one",
    b"<": f"is a page of HTML or XML and no weights: the download failed; {_AGAIN}",
    b"{": f"is JSON text and no weights, as a download that failed leaves it; {_AGAIN}, or give the folder it lies in",
}


def is_pickled(file: Path) -> bool:
    """True for a file of `torch.save`, False for safetensors.

    Raises: CheckpointError that says what a file of any other kind is, and what to do.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(512)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header < 1 << 40:
        if header + 8 > size:
            raise CheckpointError(f"{file} is cut short and cannot be read as safetensors; {_AGAIN}")
        return False
    zipped = head[:4] == b"PK\x03\x04" and zipfile.is_zipfile(file)
    if zipped or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        if file.suffix.lower() == ".safetensors":
            raise CheckpointError(f"{file} is a file of torch.save and no safetensors; rename it to {file.stem}.pt")
        return True
    raise CheckpointError(f"{file} {_what(head)}")


def is_pointer(file: Path) -> bool:
    """True for a Git LFS pointer."""
    with file.open("rb") as opened:
        return opened.read(len(_POINTER)) == _POINTER


def _what(head: bytes) -> str:
    if not head:
        return f"is empty (0 bytes); {_AGAIN}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, what in _BEGINNINGS.items():
        if head.startswith(beginning) or text.startswith(beginning):
            return what
    if head[:4] == b"PK\x03\x04":
        return f"is a torch.save file or a zip archive that is cut short; {_AGAIN}"
    return (
        f"holds no weights (it begins with {head[:8]!r}) and cannot be read as safetensors or as a file of torch.save; "
        "give a .safetensors, .pt, .pth, .bin or .ckpt file"
    )
