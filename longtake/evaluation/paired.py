"""Intervals over worlds, and of what two rows differ by in the same worlds: bootstrap, in which the rows stay paired.

A difference between two rows of one evaluation is far better known than either: worlds, seeds and noise are the same,
so worlds are resampled, and both rows with them. Always the same 2,000 resamples. This file must know no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.evaluation.report import aligned
from longtake.toy.metrics import WorldScores
from longtake.toy.truth import Floats, nanmean

SAMPLES = 2000
LAST = 4  # windows at the end of a video that are looked at together
ROUND_TRIP = "vae round trip"

# title, name of the number, format, whether rows are compared by their ratio (else by the difference)
_KEPT = tuple((part, f"{part}_kept", "{:.1%}", False) for part in ("shape", "colour", "count"))
_WHOLE = (
    ("position px", "position_error_px", "{:.2f}", True),
    ("motion", "motion", "{:.3f}", False),
    *_KEPT,
)
_LAST = (
    *((title, f"last_{name}", form, is_ratio) for title, name, form, is_ratio in (_WHOLE[1], *_KEPT)),
    ("lost", "last_lost", "{:.1%}", False),
    ("saturation", "last_saturation", "{:.3f}", True),
    ("contrast", "last_contrast", "{:.3f}", True),
)
_SWITCH = (
    ("follow", "follow", "{:.1%}", False),
    ("count", "after_count_kept", "{:.1%}", False),
    ("shape", "after_shape_kept", "{:.1%}", False),
    ("colour", "after_colour_kept", "{:.1%}", False),
)


@dataclass(frozen=True, eq=False)
class Share:
    """A number over W worlds, sum of `sums` [W] / sum of `counts` [W]."""

    sums: Floats
    counts: Floats

    @classmethod
    def of(cls, values: Sequence[float]) -> Share:
        """The mean of a value a world; NaN = not scored. An infinite value makes the mean infinite."""
        array = np.array(values, np.float64)
        scored = ~np.isnan(array)
        return cls(np.where(scored, array, 0.0), scored.astype(np.float64))

    def within(self, worlds: NDArray[np.bool_]) -> Share:
        """The same over some of the worlds [W] alone."""
        return Share(np.where(worlds, self.sums, 0.0), np.where(worlds, self.counts, 0.0))

    def means(self, drawn: NDArray[np.int64]) -> Floats:
        """The number in each sample [N] of worlds, `drawn` [N, W]; NaN where none of them was scored."""
        counts = self.counts[drawn].sum(1)
        return np.divide(self.sums[drawn].sum(1), counts, out=np.full(len(drawn), np.nan), where=counts > 0)


@lru_cache(maxsize=8)
def _drawn(worlds: int) -> NDArray[np.int64]:
    """All worlds as they are, then the samples."""
    drawn = np.random.default_rng(0).integers(0, worlds, (SAMPLES, worlds))
    return np.concatenate([np.arange(worlds)[None], drawn])


def interval(values: Floats) -> list[float] | None:
    """[value, low, high] of the value as it is and those of the samples; None where it is not known."""
    if not np.isfinite(values[0]):
        return None
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return [float(values[0]), float(low), float(high)]


def shares(scores: Sequence[WorldScores]) -> dict[str, Share]:
    """All numbers of a row by name, from the scores of its worlds in their order.

    `last_...`: over the last `LAST` windows; `after_...`: in the window that begins with a switch; `follow`: a share of
    sprites.
    """
    kept = [name for _, name, *_ in _KEPT]
    found = {name: Share.of([nanmean(getattr(s, name)) for s in scores]) for name in kept}
    found["position_error_px"] = Share.of([nanmean(s.position_error) for s in scores])
    found["motion"] = Share.of([nanmean(s.sprite_motion_ratio) for s in scores])
    windows = [s.windows for s in scores if s.windows is not None]
    if len(windows) < len(scores):
        return found
    motion = [[nanmean(window) for window in w.motion_ratio] for w in windows]
    found["last_motion"] = Share.of([nanmean(np.array(rows[-LAST:])) for rows in motion])
    for name in (*kept, "lost", "saturation", "contrast"):
        found[f"last_{name}"] = Share.of([nanmean(getattr(w, name)[-LAST:]) for w in windows])
    if len(windows[0].follows):
        follows = [w.follows for w in windows]
        sums = np.array([np.nansum(f) for f in follows])
        found["follow"] = Share(sums, np.array([np.isfinite(f).sum() for f in follows], np.float64))
        found |= {f"after_{name}": Share.of([nanmean(getattr(w, f"after_{name}")) for w in windows]) for name in kept}
    return found


def intervals(row: Mapping[str, Share]) -> dict[str, list[float] | None]:
    """[value, low, high] of each number: the 95 % interval over worlds."""
    return {name: interval(one.means(_drawn(len(one.sums)))) for name, one in row.items()}


def compared(row: Mapping[str, Share], other: Mapping[str, Share]) -> dict[str, list[float] | None]:
    """The same of what `row` has more than `other` in the worlds in which both were scored; of some numbers, how many
    times as much.
    """
    found = {}
    ratios = {name for _, name, _, is_ratio in (*_WHOLE, *_LAST, *_SWITCH) if is_ratio}
    for name in row:
        both, drawn = (row[name].counts > 0) & (other[name].counts > 0), _drawn(len(row[name].sums))
        mine, theirs = (one[name].within(both).means(drawn) for one in (row, other))
        with np.errstate(divide="ignore", invalid="ignore"):
            found[name] = interval(mine / theirs if name in ratios else mine - theirs)
    return found


def last_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The last windows of each row, and in brackets the interval of the difference to the row `vae round trip` (of
    saturation and contrast: of the ratio, which is also the number before the brackets).
    """
    cells = [[f"last {LAST} windows", *(title for title, *_ in _LAST)]]
    for row, summary in summaries.items():
        beside = summary["compared"].get(ROUND_TRIP, {})
        values = []
        for _, name, form, is_ratio in _LAST:
            against = beside.get(name)
            value = ([1.0] if row == ROUND_TRIP else against) if is_ratio else summary["intervals"][name]
            values.append(_cell(value, against, form, points=not is_ratio))
        cells.append([row, *values])
    return aligned(cells)


def switch_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """How each row goes on after a switch, each number with its interval: sprites that follow within two blocks, and
    shares of right frames in the window that begins with the switch.
    """
    cells = [["after a switch", "sprites", *(title for title, *_ in _SWITCH)]]
    for row, summary in summaries.items():
        values = [(summary["intervals"][name], form) for _, name, form, _ in _SWITCH]
        number = str(summary["windows"]["num_followers"])
        cells.append([row, number, *(_cell(value, value, form) for value, form in values)])
    return aligned(cells)


def pairs_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows against others in the same worlds: differences (percentages: in points), and of position, saturation and
    contrast ratios, with intervals; "" where no two rows are compared.
    """
    pairs = [(row, other) for row, summary in summaries.items() for other in summary["compared"] if other != ROUND_TRIP]
    if not pairs:
        return ""
    known = summaries[pairs[0][0]]["intervals"]
    columns = [
        (f"{when}{title}{' x' * is_ratio}", name, "{:.3f}" if is_ratio else form, is_ratio)
        for when, part in (("", _WHOLE), ("last ", _LAST), ("after ", _SWITCH))
        for title, name, form, is_ratio in part
        if name in known
    ]
    cells = [["row against row", *(title for title, *_ in columns)]]
    for row, other in pairs:
        found = summaries[row]["compared"][other]
        values = []
        for _, name, form, is_ratio in columns:
            values.append(_cell(found[name], found[name], form, points=not is_ratio))
        cells.append([f"{row} against {other}", *values])
    return aligned(cells)


def _cell(value: Sequence[float] | None, span: Sequence[float] | None, form: str, *, points: bool = False) -> str:
    """A number, and in brackets the ends of `span`; `points`: differences, of shares in points, with their signs."""
    if value is None:
        return "-"
    own = value is span  # the difference itself is the number
    signed = "{:+.1f}" if "%" in form else "{:+.3f}"
    scale = 100 if "%" in form else 1

    def shown(number: float, *, difference: bool) -> str:
        return signed.format(scale * number) if difference else form.format(number)

    head = shown(value[0], difference=points and own)
    if span is None:
        return head
    return f"{head} ({shown(span[1], difference=points)} to {shown(span[2], difference=points)})"
