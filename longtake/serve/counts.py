"""What has happened since a server began, in numbers."""

from __future__ import annotations


class Counts:
    """What has happened since the server began."""

    def __init__(self) -> None:
        self.frames = 0
        self.stalls = 0
        self.opened = 0
        self.ended: dict[str, int] = {}

    def end(self, reason: str) -> None:
        self.ended[reason] = self.ended.get(reason, 0) + 1
