"""What objectives are fed: one micro-batch after the encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from longtake.condition import Condition


@dataclass(frozen=True)
class EncodedBatch:
    """One micro-batch of conditions and, where the stage learns from videos, clean latents.

    Fields: `indices` global sample indices (they key every random number); `condition`; `empty_text` [B, M, text_dim]
    embeddings of the empty or negative prompt; `latent_size` (H, W); `latents` [B, F, C, H, W] of the real video or
    None; `first_latent` [B, 1, C, H, W] the given picture, or None for text-to-video; `later_text` [B, M, text_dim] the
    prompt that a video switches to, or None; `switch_frames`, for each row the latent frame from which that prompt
    holds in `latents`, None where it never does; empty where it does in no row; `path` [B, K + 1, F, C, H, W] a
    teacher's states on the way to a clip, at the K levels of the plan, falling, and its end; or None.
    """

    indices: Sequence[int]
    condition: Condition
    empty_text: Tensor
    latent_size: tuple[int, int]
    latents: Tensor | None = None
    first_latent: Tensor | None = None
    later_text: Tensor | None = None
    switch_frames: Sequence[int | None] = ()
    path: Tensor | None = None

    @property
    def unconditional(self) -> Condition:
        """The same picture under the empty prompt (guidance keeps y and CLIP tokens)."""
        return self.condition.with_text(self.empty_text)

    def first(self) -> EncodedBatch:
        """Its first row, without a video of it."""

        def cut(x: Tensor | None) -> Any:
            return None if x is None else x[:1]

        parts: dict[str, Any] = {
            name: cut(getattr(self, name)) for name in ("empty_text", "first_latent", "later_text")
        }
        return replace(
            self,
            indices=self.indices[:1],
            condition=self.condition.rows(slice(1)),
            latents=None,
            path=None,
            switch_frames=(),
            **parts,
        )
