"""What accelerators can do: the one table of peak rates and memory, with where each number is from.

All rates here are data-sheet peaks of dense work. This file must know no model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peaks of one kind of accelerator, in operations a second, and its memory.

    `marks` are parts of the name that torch reports, all of which must be in it.
    """

    name: str
    marks: tuple[str, ...]
    bf16: float
    fp32: float
    memory_bytes: int
    source: str

    def peak(self, precision: str) -> float:
        """Operations a second of matrix products in `bf16` or `fp32` (TF32 is off unless torch is told otherwise)."""
        return self.bf16 if precision == "bf16" else self.fp32


# Order matters where one name contains the marks of another.
DEVICES = (
    Device("H200", ("H200",), 989e12, 67e12, 141 * 10**9, "NVIDIA H200 SXM data sheet"),
    Device("H100", ("H100", "HBM3"), 989e12, 67e12, 80 * 10**9, "NVIDIA H100 SXM data sheet"),
    Device("A100", ("A100", "SXM", "80GB"), 312e12, 19.5e12, 80 * 10**9, "NVIDIA A100 data sheet"),
)


def find_device(name: str) -> Device | None:
    """The device of this name, as torch reports it (`NVIDIA H200`) or as the table calls it; None if not known."""
    for device in DEVICES:
        if name.upper() == device.name or all(mark.lower() in name.lower() for mark in device.marks):
            return device
    return None
