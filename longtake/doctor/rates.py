"""The constants of the speed model, in one table: what kernels, memory and links reach, and how each is known.

`measured` values were taken on one NVIDIA H200 (torch 2.11, CUDA 13) with random data at 480x832: kernels of the 1.3B
model by `benchmarks/full_size.py` on 2026-11-26, whole steps by `benchmarks/two_gpus.py` on 2026-11-27, fitted to both
of its runs (docs/log.md); attention's backward and the copy rate on 2026-11-23. `assumed` ones are nobody's
measurement: replace them first. For another device all compute rates are scaled by its data-sheet peaks, and nothing
counts as measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from longtake.devices import Device, find_device
from longtake.errors import ConfigError

Known = Literal["measured", "data sheet", "assumed", "counted"]


@dataclass(frozen=True)
class Constant:
    """A value with its unit, its meaning and how it is known; `scales` with a device's `bf16`, `memory` or `link`."""

    value: float
    unit: str
    known: Known
    meaning: str
    scales: str = ""


_TABLE: dict[str, Constant] = {
    "products": Constant(782e12, "FLOP/s", "measured", "bfloat16 matrix products, 8192^3", "bf16"),
    "attention_long": Constant(569e12, "FLOP/s", "measured", "attention forward, 21 frames to 21, cuDNN", "bf16"),
    "attention_block": Constant(582e12, "FLOP/s", "measured", "attention forward, 4 frames to 13, cuDNN", "bf16"),
    "attention_backward": Constant(534e12, "FLOP/s", "measured", "attention backward, whole clip, cuDNN", "bf16"),
    "attention_masked": Constant(300e12, "FLOP/s", "assumed", "masked attention (flex), both directions", "bf16"),
    "float32_share": Constant(0.8, "", "assumed", "of the data-sheet peak, for fp32 products and attention"),
    "memory": Constant(4.3e12, "B/s", "measured", "element-wise operations: device copy, read and written", "memory"),
    "call": Constant(6e-6, "s", "assumed", "the host's time to start one operation of eager PyTorch"),
    "compiled_bytes": Constant(0.4, "", "assumed", "share of element-wise bytes and calls left by torch.compile"),
    "optimizer_bytes": Constant(
        72.0, "B", "measured", "moved by norm and AdamW for a trained number (25 ms of 1.56e9)"
    ),
    "link": Constant(340e9, "B/s", "assumed", "one direction of a GPU's links in a node (data sheet 450e9)", "link"),
    "network": Constant(40e9, "B/s", "assumed", "one direction of a GPU's share between nodes (400 Gb/s: 50e9)"),
    "host_link": Constant(50e9, "B/s", "assumed", "between a GPU and its host's memory (PCIe 5 x16: 64e9)"),
    "hop_node": Constant(2e-6, "s", "assumed", "one step of a ring inside a node"),
    "hop_network": Constant(6e-6, "s", "assumed", "one step of a ring that leaves a node"),
    "overlap": Constant(0.8, "", "assumed", "share of computing behind which gathering of weights can hide"),
    "slowdown": Constant(1.067, "", "measured", "seconds of calls of whole clips over those of counted work"),
    "slowdown_blocks": Constant(1.256, "", "measured", "seconds of roll-out calls, a block each, over counted work"),
}


@dataclass(frozen=True)
class Rates:
    """The constants for one device: `rates["products"]`."""

    device: Device
    table: Mapping[str, Constant]

    def __getitem__(self, name: str) -> float:
        return self.table[name].value

    @property
    def is_calibrated(self) -> bool:
        """True when whole training steps were measured."""
        return self.table["slowdown"].known == "measured"

    def replaced(self, known: Known, **values: float) -> Rates:
        """The same with some values replaced."""
        changed = {name: replace(self.table[name], value=value, known=known) for name, value in values.items()}
        return replace(self, table={**self.table, **changed})

    def markdown(self) -> str:
        """The table for documents."""
        lines = ["| constant | value | known | what it is |", "|---|---|---|---|"]
        for name, one in self.table.items():
            lines.append(f"| `{name}` | {one.value:g} {one.unit}".rstrip() + f" | {one.known} | {one.meaning} |")
        return "\n".join(lines)


def rates_of(device: str = "H200") -> Rates:
    """The constants of a device by its name. Raises: ConfigError when its peaks are not known."""
    reference, wanted = find_device("H200"), find_device(device)
    assert reference is not None
    if wanted is None:
        raise ConfigError(f"--device {device} is not in the table of longtake/devices.py; take H200, H100 or A100")
    if wanted is reference:
        return Rates(wanted, _TABLE)
    ratios = {
        "bf16": wanted.bf16 / reference.bf16,
        "memory": wanted.memory_bandwidth / reference.memory_bandwidth,
        "link": wanted.link / reference.link,
        "": 1.0,
    }
    scaled = {name: replace(one, value=one.value * ratios[one.scales], known="assumed") for name, one in _TABLE.items()}
    return Rates(wanted, scaled)
