"""`longtake train` on the ranks of torchrun; in validations rank 1 runs out of memory once, while it decodes alone."""

import sys

import torch

from longtake.cli.app import app
from longtake.train import row_validation

exact, calls = row_validation.decoded, []


def out_of_memory(*arguments):
    calls.append(1)
    if len(calls) == 5 and torch.distributed.get_rank() == 1:  # 2 rows x (teacher, student); step 2
        raise torch.OutOfMemoryError("CUDA out of memory (a test)")
    return exact(*arguments)


if __name__ == "__main__":
    row_validation.decoded = out_of_memory
    torch.set_num_threads(1)
    app(sys.argv[1:])
