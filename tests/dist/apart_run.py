"""`longtake train` on the ranks of torchrun; in the validation after two iterations rank 1 runs out of memory where the
weights of the student are gathered, and rank 0 waits for its part of them.
"""

import sys

import torch

from longtake.cli.app import app
from longtake.train import networks, row_validation

gathered, measured, steps = networks.gathered, row_validation.RowValidation._measured, []


def out_of_memory(*arguments):
    if steps[-1:] == [2] and torch.distributed.get_rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory (a test)")
    return gathered(*arguments)


def noted(self, step):
    steps.append(step)
    return measured(self, step)


if __name__ == "__main__":
    networks.gathered, row_validation.RowValidation._measured = out_of_memory, noted
    row_validation.GRACE_SECONDS = 3.0
    torch.set_num_threads(1)
    app(sys.argv[1:])
