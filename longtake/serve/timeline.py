"""How a session began and what changed when: its history, and the script that makes the same video again."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from longtake.errors import ConfigError

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
        """A zip with `story.yaml` for `longtake generate --script` and its pictures: the first `num_frames` frames.

        Raises: ConfigError for a target that was set before the first frame, of which scripts have none.
        """
        begin, files = self.beginning, _Files()
        picture = first_picture = files.add(begin.picture)
        events: dict[int, dict[str, Any]] = {}
        for change in self.changes:
            if change.frame >= num_frames:
                continue
            event = events.setdefault(change.frame, {"frame": change.frame})
            if change.kind == "image":
                picture = files.add(change.picture)
                event |= {"image": picture, "alone": picture is None or None, "target": None}
            if change.kind == "target":
                # A scene that moves towards its own picture is one without a target.
                event["target"] = files.add(change.picture) or picture
            event["prompt"] = change.prompt
        first = events.pop(0, {})
        if first.get("target") not in (None, first.get("image", first_picture)):
            raise ConfigError(
                "a script begins without a target, and this session has had one since its first frame; rewind to frame "
                "0, and set the target when that frame has come"
            )
        story = {
            "image": first.get("image", first_picture),
            "prompt": first.get("prompt", begin.prompt),
            "frames": num_frames,
            "seed": begin.seed,
            "guidance": begin.guidance,
            "negative": begin.negative,
            "events": [_said(events[frame]) for frame in sorted(events)],
        }
        return files.packed(yaml.safe_dump(_said(story), sort_keys=False))


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


class _Files:
    """Pictures by name, each once."""

    def __init__(self) -> None:
        self.names: dict[bytes, str] = {}

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
