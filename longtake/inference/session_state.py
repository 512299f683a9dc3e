"""What a session follows and where it stands: plain values that `Session` replaces as a whole.

Must know no generator and no file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from longtake.encoders.condition import ConditionFrames
from longtake.encoders.sessions import DecoderSession
from longtake.models.cache import KVCache
from longtake.rollout.stream import LatentStream


@dataclass(frozen=True, eq=False)
class SessionInputs:
    """What the frames should follow: a prompt, the scene's own picture and another one to move towards, or None.

    Pictures are [1, 3, h, w] in [-1, 1].
    """

    prompt: str
    picture: Tensor | None = None
    target: Tensor | None = None

    def same_pictures(self, other: SessionInputs) -> bool:
        return self.picture is other.picture and self.target is other.target


@dataclass
class SessionState:
    """Where a session stands between two blocks: all that `Session.next` changes, in a copy that takes its place.

    `inputs`, the one that the latest block followed; `stream` and `decoder` of the running scene, None before the
    first; `y`, the condition frames of that scene while they are not all encoded, else None; `scene` counts cuts;
    `num_frames` pixel frames given out.
    """

    inputs: SessionInputs
    stream: LatentStream | None = None
    decoder: DecoderSession | None = None
    y: ConditionFrames | None = None
    scene: int = -1
    num_frames: int = 0

    def encode(self, num_latent_frames: int | None = None) -> None:
        """Encodes `y` as far as latent frames before that one read it (None: to its end)."""
        if self.y is None:
            return
        most = self.y.frames.shape[1]
        self.y.reach(most if num_latent_frames is None else num_latent_frames)
        if self.y.reached == most:
            self.y = None  # and with it what the encoder remembers

    def copy(self, clones: dict[int, KVCache] | None = None) -> SessionState:
        """Another one at the same place; its caches are shared, or with `clones` (by identity) copied once each.

        The decoder's features go with the one that decodes first, or with `clones` each has its own.
        """

        def clone(cache: KVCache) -> KVCache:
            assert clones is not None
            if id(cache) not in clones:
                clones[id(cache)] = cache.copy()
            return clones[id(cache)]

        stream = None if self.stream is None else self.stream.copy(None if clones is None else clone)
        decoder = self.decoder
        if decoder is not None:
            decoder = decoder.copy() if clones is None else decoder.fork()
        return replace(self, stream=stream, decoder=decoder)


def remembered(
    history: tuple[SessionState, ...],
    state: SessionState,
    now: SessionState,
    history_blocks: int,
    ready_blocks: int,
    history_caches: int | None,
) -> tuple[SessionState, ...]:
    """The history with one more state behind which `now` comes, `history_blocks` at most; the decoder's features of the
    `ready_blocks` latest stay, and others are made anew if they are needed. Each change fills the caches anew: states
    of more than `history_caches` fillings beside that of `now` are forgotten, the oldest first.
    """
    if history_blocks == 0:
        return ()
    history = (*history, state)[-history_blocks:]
    if history_caches is not None:
        history = _of_few_caches(history, now, history_caches)
    for past in history[: len(history) - ready_blocks]:
        if past.decoder is not None and ready_blocks:
            past.decoder.release()
    return history


def _of_few_caches(history: tuple[SessionState, ...], now: SessionState, most: int) -> tuple[SessionState, ...]:
    """The latest states that share `most` contents of caches beside that of `now`."""
    contents = {now.stream.content} if now.stream is not None else set()
    for index in range(len(history) - 1, -1, -1):
        if (stream := history[index].stream) is not None:
            contents.add(stream.content)
        if len(contents) > most + 1:
            return history[index + 1 :]
    return history
