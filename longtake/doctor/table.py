"""A recipe on 1 to 1024 GPUs: for each number the mesh that the models of memory and speed like best. Markdown.

The best mesh fits the device, keeps the batch within what is known to train well where that is possible, and then takes
the least time a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longtake.config import StageConfig
from longtake.doctor.layout import Layout, candidates, divisors, heads
from longtake.doctor.memory import Networks
from longtake.doctor.need import HEADROOM, Need, stage_need
from longtake.doctor.rates import Rates
from longtake.doctor.speed import PHASES, Prediction, SpeedModel

GPU_COUNTS = (1, 2, 4, 8, 64, 256, 1024)
# The largest batches that recipes of this kind are published with: LongLive v1 and Causal-Forcing. Larger ones are
# nobody's experience that we know of.
KNOWN_BATCH = 64


@dataclass(frozen=True)
class Row:
    """One number of GPUs with the mesh and batch chosen for it."""

    config: StageConfig
    layout: Layout
    need: Need
    prediction: Prediction
    fits: bool

    @property
    def order(self) -> tuple[float, ...]:
        """Smaller is better."""
        batch = self.config.batch_size
        late = batch if batch > KNOWN_BATCH else 0
        if not self.fits:
            return (1, self.need.peak, late)
        return (0, late, self.prediction.total / batch)


def best_row(
    config: StageConfig, networks: Networks, gpus: int, rates: Rates, image_tokens: int, *, like: Layout
) -> Row:
    """The best mesh for `gpus` ranks. Args: `like`, a layout with all that is not the mesh."""
    start = Layout(gpus, like.gpus_per_node, 1, 1, like.shared_base, like.cpu_offload, like.compile)
    rows = []
    for layout, changed in candidates(config, networks, start):
        need = stage_need(changed, networks, gpus, image_tokens=image_tokens, layout=layout)
        fits = need.peak * HEADROOM <= rates.device.memory_bytes
        prediction = SpeedModel(changed, networks, layout, rates, image_tokens).predict()
        rows.append(Row(changed, layout, need, prediction, fits))
    return min(rows, key=lambda row: row.order)


def markdown(
    config: StageConfig,
    networks: Networks,
    rates: Rates,
    image_tokens: int,
    *,
    like: Layout,
    counts: Sequence[int] = GPU_COUNTS,
) -> str:
    """The table of a recipe: predictions, and what they mean where a row is no good."""
    rows = [best_row(config, networks, count, rates, image_tokens, like=like) for count in counts]
    used = [name for name in PHASES if any(row.prediction.seconds.get(name, 0) >= 0.005 for row in rows)]
    head = ["GPUs", "replicas x shards", "sequence", "batch", "GiB a rank", "s a step", *used]
    head += ["samples/s", "MFU", "GB in node", "GB between", "remark"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        layout, guess = row.layout, row.prediction
        cells = [
            str(layout.gpus),
            f"{layout.copies} x {layout.shards}",
            str(layout.sequence),
            str(row.config.batch_size),
            f"{row.need.peak / 2**30:.0f}",
            f"{guess.total:.2f}",
            *(f"{guess.seconds.get(name, 0):.2f}" for name in used),
            f"{guess.samples_per_second:.2f}",
            f"{guess.utilisation:.0%}",
            f"{guess.node_bytes / 1e9:.0f}",
            f"{guess.network_bytes / 1e9:.0f}",
            _remark(row, networks),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _remark(row: Row, networks: Networks) -> str:
    found = []
    if not row.fits:
        found.append("does not fit")
    if row.config.batch_size > KNOWN_BATCH:
        longest = max(k for k in divisors(heads(networks)) if row.layout.gpus_per_node % k == 0)
        found.append(f"batch beyond {KNOWN_BATCH}, which has work for {KNOWN_BATCH * longest} GPUs at most")
    return "; ".join(found)
