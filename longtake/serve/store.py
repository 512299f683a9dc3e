"""Sessions on the disk: who may open them, their saves, and the history up to each. A folder a session.

`session.json` is written anew, whole or not at all, with each save; pictures lie beside it under their checksums. What
is not as it was written is left out, with a word in the log.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longtake.outputs import whole_file, write_whole
from longtake.serve.timeline import Beginning, Change, Timeline

logger = logging.getLogger(__name__)

_FILE, _VERSION = "session.json", 1
_NAME = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Saved:
    """A save: its number and frame, what `Engine.do_restore` needs beside the file, and the history up to it."""

    save: int
    frame: int
    number: int
    past: int
    timeline: Timeline

    def public(self) -> dict[str, int]:
        return {"save": self.save, "frame": self.frame}


@dataclass(frozen=True)
class Stored:
    """A session that can be opened: `secret`, the digest of its secret."""

    folder: Path
    secret: bytes
    saves: tuple[Saved, ...]

    @property
    def name(self) -> str:
        return self.folder.name


def save_file(folder: Path, save: int) -> Path:
    """Where the session itself lies."""
    return folder / f"save-{save}.safetensors"


def write(stored: Stored) -> None:
    """Writes what is known of a session, and removes files of saves that are no more. Raises: OutputError."""
    values = {
        "version": _VERSION,
        "secret": stored.secret.hex(),
        "saves": [
            {
                "save": one.save,
                "frame": one.frame,
                "number": one.number,
                "past": one.past,
                "timeline": _timeline_out(one.timeline, stored.folder),
            }
            for one in stored.saves
        ],
    }
    write_whole(stored.folder / _FILE, json.dumps(values), synced=True)
    kept = {save_file(stored.folder, one.save) for one in stored.saves}
    for old in set(stored.folder.glob("save-*.safetensors")) - kept:
        old.unlink(missing_ok=True)


def read_all(folder: Path) -> dict[str, Stored]:
    """The sessions in a folder that can be opened, by name; those of which nothing can be are left where they are."""
    found = {}
    for file in sorted(folder.glob(f"*/{_FILE}"), key=lambda file: file.stat().st_mtime):
        try:
            stored = _read(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            logger.warning("session %s cannot be read and is left out", file.parent.name)
            continue
        found[stored.name] = stored
    return found


def is_own(folder: Path) -> bool:
    """Whether a folder is one that a server made: what else lies beside them is somebody's, and never removed."""
    return _NAME.fullmatch(folder.name) is not None and folder.is_dir() and not folder.is_symlink()


def new_name() -> str:
    """The name of a session and of its folder, which nobody guesses."""
    return secrets.token_hex(8)


def remove(folder: Path) -> None:
    """Removes all of a session."""
    shutil.rmtree(folder, ignore_errors=True)


def _read(file: Path) -> Stored:
    values, folder = json.loads(file.read_text(encoding="utf-8")), file.parent
    if values["version"] != _VERSION:
        raise ValueError("another version")
    saves = []
    for one in values["saves"]:
        numbers = {name: int(one[name]) for name in ("save", "frame", "number", "past")}
        if save_file(folder, numbers["save"]).is_file():
            saves.append(Saved(**numbers, timeline=_timeline_in(one["timeline"], folder)))
    return Stored(folder, bytes.fromhex(values["secret"]), tuple(saves))


def _timeline_out(timeline: Timeline, folder: Path) -> dict[str, Any]:
    def out(one: Beginning | Change) -> dict[str, Any]:
        return {**asdict(one), "picture": _picture_out(one.picture, folder)}

    return {
        "beginning": out(timeline.beginning),
        "changes": [out(change) for change in timeline.changes],
        "number": timeline.number,
    }


def _timeline_in(values: dict[str, Any], folder: Path) -> Timeline:
    def into(one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "picture": _picture_in(one["picture"], folder)}

    changes = [Change(**into(one)) for one in values["changes"]]
    return Timeline(Beginning(**into(values["beginning"])), changes, int(values["number"]))


def _picture_out(picture: bytes | None, folder: Path) -> str | None:
    if picture is None:
        return None
    key = hashlib.sha256(picture).hexdigest()
    path = folder / f"{key}.png"
    if not path.exists():  # under its name it is whole, else a session that was killed or met a full disk is lost
        with whole_file(path) as file:
            file.write_bytes(picture)
    return key


def _picture_in(key: str | None, folder: Path) -> bytes | None:
    if key is None:
        return None
    picture = (folder / f"{int(key, 16):064x}.png").read_bytes()
    if hashlib.sha256(picture).hexdigest() != key:
        raise ValueError("a picture is damaged")
    return picture
