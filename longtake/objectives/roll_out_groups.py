"""Which iterations learn from one roll-out, where the critic is updated several times on the same clips."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RollOutGroups:
    """Groups of iterations that share a roll-out: up to `updates_per_rollout` updates of the critic, and none across an
    update of the student, which itself makes the roll-out of its iteration.

    So clips are always those of the student as it is; and a resumed run, whose student is what it was when the group
    began, makes the same ones again, bit for bit, without a copy of them in the checkpoint.

    Fields: iterations to one update of the generator (`updates_per_generator`), after the first `warmup_steps`, which
    have none.
    """

    updates_per_rollout: int
    updates_per_generator: int
    warmup_steps: int

    def begin(self, step: int) -> int:
        """The iteration that makes the clips of iteration `step`: itself, or one before."""
        return step - self._since(step) % self.updates_per_rollout

    def number(self, step: int) -> int:
        """How many groups there are before that of iteration `step`."""
        if step < self.warmup_steps:
            return step // self.updates_per_rollout
        cycles, after = divmod(step - self.warmup_steps, self.updates_per_generator)
        before = self._groups(self.warmup_steps) + cycles * (1 + self._groups(self.updates_per_generator - 1))
        return before if after == 0 else before + 1 + self._since(step) // self.updates_per_rollout

    def _since(self, step: int) -> int:
        """Iterations since the student was updated, or since the first; 0 where it is updated now."""
        if step < self.warmup_steps:
            return step
        after = (step - self.warmup_steps) % self.updates_per_generator
        return max(0, after - 1)

    def _groups(self, iterations: int) -> int:
        return -(-iterations // self.updates_per_rollout)
