"""What a server allows: addresses, limits, places. Must know no network and no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from longtake.errors import ConfigError

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """What one session, one message and one client may take. Sizes in bytes, times in seconds."""

    prompt_chars: int = 1000
    upload_bytes: int = 16 << 20
    body_bytes: int = (16 << 20) + (64 << 10)  # an upload and what is around it
    pixels: int = 32 << 20  # of a picture, whatever its file weighs
    message_bytes: int = 4096  # of a viewer
    messages_per_second: int = 50
    creates_per_minute: int = 30  # of all clients
    changes_per_second: int = 10  # of a session
    changes: int = 1000  # of a session, those that were taken back too
    kept_pictures_bytes: int = 64 << 20  # of a session: those of its changes that hold, which its script needs
    viewers: int = 4  # of a session
    connections: int = 256
    queued: int = 16
    idle_seconds: float = 600.0  # without a viewer and a request
    total_seconds: float = 4 * 3600.0
    hello_seconds: float = 5.0
    slow_seconds: float = 15.0  # a viewer that takes nothing for so long is dropped
    saves: int = 4  # of a session
    kept_sessions: int = 64  # that have ended
    recording_bytes: int = 2 << 30


@dataclass(frozen=True)
class ServeSettings:
    """How a server runs. `folder`, where recordings and saves lie; `hosts`, names by which it may be called beside its
    own address; `max_sessions`, None: as many as were measured to keep real time; `history_blocks` that can be taken
    back, also by changes that drop what was not shown.

    Raises: ConfigError for an address beyond this machine without a token, and for values that are none.
    """

    folder: Path = Path("outputs/live")
    host: str = "127.0.0.1"
    port: int = 8765
    token: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    max_sessions: int | None = None
    blocks_ahead: int = 2
    history_blocks: int = 8
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not self.is_local and not self.token:
            raise ConfigError(
                f"host={self.host} can be reached from other machines, and there is no token; give --token-file, and "
                "put a proxy with TLS in front"
            )
        if self.token is not None and len(self.token) < 16:
            raise ConfigError("the token is shorter than 16 characters; make a longer one: openssl rand -hex 32")
        if self.max_sessions is not None and self.max_sessions < 1:
            raise ConfigError(f"max_sessions={self.max_sessions} must be at least 1")
        for name, least in (("blocks_ahead", 1), ("history_blocks", 0)):
            if not least <= getattr(self, name) <= 64:
                raise ConfigError(f"{name}={getattr(self, name)} must be between {least} and 64")

    @property
    def is_local(self) -> bool:
        """Whether it listens on this machine alone."""
        return self.host in LOCAL_HOSTS
