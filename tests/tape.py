"""A stand-in for CUDA graphs on a CPU."""

import torch


class Tape:
    """A recorder for a CPU: what it gives reads the inputs, and writes the result, where they were when it recorded."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, work):
        self.recorded += 1
        output = torch.full_like(work(), torch.nan)

        def replay():
            self.replayed += 1
            with torch.no_grad():
                output.copy_(work())

        return replay, output
