"""`longtake evaluate` on the ranks of torchrun; rank 1's scorers are killed after the second row."""

import os
import signal
import sys
from multiprocessing import current_process

import torch

from longtake.cli.app import app
from longtake.evaluation import rows

begin, begun = rows.begin_row, []


def killing(*arguments, scorers, **named):
    found = begin(*arguments, scorers=scorers, **named)
    begun.append(found)
    if len(begun) == 2 and torch.distributed.get_rank() == 1:
        for process in scorers._processes.values():
            os.kill(process.pid, signal.SIGKILL)
    return found


if __name__ == "__main__":
    rows.begin_row, rows._FRAMES_A_PROCESS, rows.num_cores = killing, 1, lambda: 4
    current_process()._config["daemon"] = False  # ranks of `forked_ranks` are, and may start no process
    torch.set_num_threads(1)
    app(sys.argv[1:])
