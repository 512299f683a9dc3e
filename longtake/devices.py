"""What accelerators can do: the one table of peak rates and memory, with where each number is from.

All rates here are data-sheet peaks of dense work. Also which device a name means. This file must know no model.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longtake.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """Peaks of one kind of accelerator, in operations a second, and its memory.

    `pattern` is found in the name that torch reports.
    """

    name: str
    pattern: str
    bf16: float
    fp32: float
    memory_bytes: int
    source: str

    def peak(self, precision: str) -> float:
        """Operations a second of matrix products in `bf16` or `fp32` (TF32 is off unless torch is told otherwise)."""
        return self.bf16 if precision == "bf16" else self.fp32


DEVICES = (
    Device("H200", "H200", 989e12, 67e12, 141 * 10**9, "NVIDIA H200 SXM data sheet"),
    Device("H100", "H100.*HBM3", 989e12, 67e12, 80 * 10**9, "NVIDIA H100 SXM data sheet"),
    Device("A100", "A100.*SXM.*80GB", 312e12, 19.5e12, 80 * 10**9, "NVIDIA A100 data sheet"),
    # Of GeForce cards "Peak BF16 (FP16) Tensor TFLOPS with FP32 Accumulate", dense, and "Peak FP32 TFLOPS (non-Tensor)"
    # of the appendix of NVIDIA's architecture papers, which were not read themselves: all three pairs were compared
    # with what others quote of nvidia-rtx-blackwell-gpu-architecture.pdf (5090), of "NVIDIA Ada GPU Architecture",
    # appendix A (4090), and of NVIDIA-ampere-GA102-GPU-Architecture-Whitepaper-V1.pdf (3090), on 2026-11-30.
    # Cards for laptops and the like have longer names.
    Device("RTX 5090", "RTX 5090$", 209.5e12, 104.8e12, 32 * 10**9, "NVIDIA RTX Blackwell GPU architecture"),
    Device("RTX 4090", "RTX 4090$", 165.2e12, 82.6e12, 24 * 10**9, "NVIDIA Ada GPU architecture"),
    Device("RTX 3090", "RTX 3090$", 71e12, 35.6e12, 24 * 10**9, "NVIDIA Ampere GA102 GPU architecture"),
)


def find_device(name: str) -> Device | None:
    """The device of this name, as torch reports it (`NVIDIA H200`) or as the table calls it; None if not known."""
    for device in DEVICES:
        short = device.name.removeprefix("RTX ")
        if name.upper() in (device.name, short) or re.search(device.pattern, name, re.IGNORECASE):
            return device
    return None


def memory_bytes(device: torch.device) -> int:
    """All the memory of a GPU, or of this machine."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory() -> tuple[int, int]:
    """Bytes of this machine, or of the container where that has a limit: all, and what may still be taken (caches of
    files make way); zeros where the system does not tell.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    total, free, group = fields["MemTotal"], fields["MemAvailable"], Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):  # no cgroup, or its limit is the word "max"
        return total, free
    return min(total, limit), min(free, limit - used + int(cached))


def usable_device(name: str | torch.device | None, option: str = "device") -> torch.device:
    """The device of a name such as cpu, cuda or cuda:1; None: a GPU if there is one.

    Raises: ConfigError naming `option` when there is none such.
    """
    import torch

    name = str(name if name is not None else "cuda" if torch.cuda.is_available() else "cpu")
    try:
        if re.fullmatch(r"cpu(:0)?|cuda(:\d{1,4})?", name) is None:
            raise RuntimeError("no name of a device")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{option}={name} cannot be used ({str(error).splitlines()[0]}); name one that is there, such as cpu, cuda "
            "or cuda:1, or leave it out"
        ) from None
    return torch.device(name)
