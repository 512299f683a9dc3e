"""A stand-in for CUDA graphs on a CPU."""

import torch


class Tape:
    """A recorder for a CPU: what it gives reads the inputs, and writes the results, where they were when it recorded."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, *works):
        return [self._record(work) for work in works]

    def _record(self, work):
        self.recorded += 1
        outputs = tuple(torch.full_like(made, torch.nan) for made in work())

        def replay():
            self.replayed += 1
            with torch.no_grad():
                for output, made in zip(outputs, work(), strict=True):
                    output.copy_(made)

        return replay, outputs
