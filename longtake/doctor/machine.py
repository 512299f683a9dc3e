"""What this machine has: processor, memory, GPUs, versions, and the attention kernels that are really used.

Must know no configuration and no model.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from longtake.devices import host_memory, num_cores
from longtake.models.attention import forward_kernels

# Needed, then optional: what is named by `pyproject.toml`
PACKAGES = (
    *("numpy", "safetensors", "pydantic", "PyYAML", "typer", "pillow", "tqdm", "transformers", "tokenizers"),
    *("diffusers", "ftfy", "lmdb", "av", "tensorboard", "matplotlib"),
)
OPTIONAL = ("triton", "webdataset", "wandb", "huggingface_hub")
# What is not counted: the CUDA context, workspaces of kernels, fragments of the allocator, remembered encodings.
HEADROOM = 1.1
_HEAD_WIDTH = 128  # of every published Wan model; specification A.1


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; bytes; `kernels` of attention by type, fastest first."""

    name: str
    capability: str
    total_bytes: int
    free_bytes: int
    kernels: dict[str, list[str]]


@dataclass(frozen=True)
class Machine:
    """What was found; sizes in bytes. `packages` maps a name to its version, None where it is not installed."""

    system: str
    cores: int
    ram_bytes: int
    ram_free_bytes: int
    gpus: list[Gpu]
    packages: dict[str, str | None]

    @property
    def missing_packages(self) -> list[str]:
        """Needed packages that are not installed."""
        return [name for name in PACKAGES if self.packages[name] is None]

    def lines(self) -> list[str]:
        """It as text."""
        ram = f"memory {in_words(self.ram_bytes)}, available {in_words(self.ram_free_bytes)}"
        lines = [f"this machine: {self.system}, {self.cores} cores, {ram}"]
        for number, gpu in enumerate(self.gpus):
            sizes = f"{in_words(gpu.total_bytes)}, free {in_words(gpu.free_bytes)}"
            lines.append(f"GPU {number}: {gpu.name}, capability {gpu.capability}, {sizes}")
            lines += [f"  attention in {dtype}: {', '.join(names)}" for dtype, names in gpu.kernels.items()]
        versions = ", ".join(f"{name} {found or 'not installed'}" for name, found in self.packages.items())
        return [*lines, *([] if self.gpus else ["no GPU that torch can use"]), versions]


def look() -> Machine:
    """The machine this runs on. Runs each attention kernel once where there is a GPU."""
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return Machine(f"{platform.system()} {platform.machine()}", num_cores(), *host_memory(), gpus, versions())


def versions() -> dict[str, str | None]:
    """Those of Python, torch, what is below it, and all packages; None where one is not there. Asks no GPU."""
    cudnn: Any = torch.backends.cudnn.version()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "cuDNN": None if cudnn is None else str(cudnn),
        **{name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
    }


def fits(needed: int, free: int) -> bool:
    """Whether so many bytes fit, with a tenth for what is not counted."""
    return needed * HEADROOM <= free


def in_words(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    device, kernels = torch.device("cuda", index), {}
    for dtype in (torch.bfloat16, torch.float32):
        found = forward_kernels(device, dtype, _HEAD_WIDTH, many_keys=True)
        kernels[str(dtype).removeprefix("torch.")] = [kernel.name for kernel in found]
    return Gpu(properties.name, f"{properties.major}.{properties.minor}", total, free, kernels)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
