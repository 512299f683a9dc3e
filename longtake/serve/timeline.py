"""How a session began and what changed when: its history, and the script that makes the same video again."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

SCRIPT = "story.yaml"


@dataclass(frozen=True)
class Beginning:
    """What a session was opened with; `picture`, a PNG at the size of the video, or None."""

    prompt: str
    picture: bytes | None
    seed: int
    guidance: float | None
    negative: str | None


@dataclass(frozen=True)
class Change:
    """Change `number`: from frame `frame` on another prompt, or `image` or `target` (a PNG, None for none)."""

    number: int
    kind: str
    frame: int
    prompt: str
    picture: bytes | None = None

    def public(self) -> dict[str, Any]:
        known = {"number": self.number, "kind": self.kind, "from_frame": self.frame, "prompt": self.prompt}
        return {**known, "has_picture": self.picture is not None}


@dataclass
class Timeline:
    """The changes of a session that hold, in order; `number`, the latest ever given."""

    beginning: Beginning
    changes: list[Change] = field(default_factory=list)
    number: int = 0

    def add(self, change: Change) -> None:
        self.changes.append(change)

    def cut(self, frame: int, *, keep: bool) -> None:
        """Forgets what holds from `frame` or later; `keep`: it holds from that frame instead."""
        kept = [one for one in self.changes if one.frame < frame]
        if keep:
            kept += [replace(one, frame=frame) for one in self.changes if one.frame >= frame]
        self.changes = kept

    def copy(self) -> Timeline:
        return replace(self, changes=list(self.changes))

    @property
    def pictures_bytes(self) -> int:
        """What its pictures take in memory."""
        return sum(len(one.picture) for one in self.changes if one.picture is not None)

    @property
    def prompt(self) -> str:
        """The prompt of the next block."""
        return self.changes[-1].prompt if self.changes else self.beginning.prompt

    def script(self, num_frames: int) -> bytes:
        """A zip with `story.yaml` for `longtake generate --script` and its pictures: the first `num_frames` frames."""
        begin, files = self.beginning, _Files()
        picture = files.add(begin.picture)
        events: dict[int, dict[str, Any]] = {}
        for change in self.changes:
            if change.frame >= num_frames:
                continue
            event = events.setdefault(change.frame, {"frame": change.frame})
            if change.kind == "image":
                picture = files.add(change.picture)
                event.pop("target", None)
            if change.kind != "prompt":
                # A scene that moves towards its own picture is one without a target.
                event[change.kind] = files.add(change.picture) or picture
            event["prompt"] = change.prompt
        first = events.pop(0, {})
        story = {
            "image": first.get("image", files.first),
            "prompt": first.get("prompt", begin.prompt),
            "frames": num_frames,
            "seed": begin.seed,
            "guidance": begin.guidance,
            "negative": begin.negative,
            "events": [events[frame] for frame in sorted(events)],
        }
        text = yaml.safe_dump({key: value for key, value in story.items() if value is not None}, sort_keys=False)
        return files.packed(text)


class _Files:
    """Pictures by name, each once."""

    def __init__(self) -> None:
        self.names: dict[bytes, str] = {}

    @property
    def first(self) -> str | None:
        return next(iter(self.names.values()), None)

    def add(self, picture: bytes | None) -> str | None:
        if picture is None:
            return None
        return self.names.setdefault(picture, f"picture-{len(self.names)}.png")

    def packed(self, text: str) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(SCRIPT, text)
            for picture, name in self.names.items():
                archive.writestr(name, picture)
        return file.getvalue()
