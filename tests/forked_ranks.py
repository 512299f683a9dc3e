"""Programs on several ranks of this machine, as torchrun starts them, but forked from a process that has imported what
they need: a start costs a fraction of a second, and not the six seconds of torch, diffusers and transformers.

No rank is started again, and ranks that outlive another by a second are ended; no clock but the limit of the test ends
ranks that all run. Where the launcher itself matters, tests start torchrun.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

GRACE_SECONDS = 1.0
# The server runs no backward pass itself: autograd's threads would not survive the fork.
PRELOADED = [
    *("torch.utils.tensorboard", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint"),
    *("diffusers", "transformers", "peft", "safetensors.torch", "av", "lmdb", "PIL.Image"),
    *("longtake.train.job", "longtake.encodings.write", "longtake.inference.batch", "longtake.cli.app"),
]
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)


def torchrun(ranks: int, *command: Any) -> CompletedProcess:
    """What came of a program on `ranks` ranks: the first exit code that is not 0, and what all of them said together.

    Args: `command`, the path of a program or `-m MODULE`, and its arguments.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        said = [Path(folder) / "stdout", Path(folder) / "stderr"]
        given = (ranks, port, [str(path) for path in said], words)
        processes = [_CONTEXT.Process(target=_rank, args=(rank, *given), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        code = None
        try:
            code = _ended(processes)
        finally:
            out, err = (path.read_text(errors="replace") if path.exists() else "" for path in said)
            if code is None:  # the limit of the test: pytest shows this beside it
                for process in processes:
                    process.kill()
                sys.stderr.write(out + err)
    return CompletedProcess(words, code, out, err)


def _ended(processes: Sequence[BaseProcess]) -> int:
    failed_at = None
    while any(process.is_alive() for process in processes):
        now = time.monotonic()
        if failed_at is None and any(process.exitcode for process in processes):
            failed_at = now
        if failed_at is not None and now > failed_at + GRACE_SECONDS:
            for process in processes:
                process.kill()
        time.sleep(0.01)
    return next((process.exitcode for process in processes if process.exitcode), 0)


def _rank(rank: int, ranks: int, port: int, said: Sequence[str], words: list[str]) -> None:
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code: Any = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 (this process ends here)
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
