"""How long sessions go on, what they hold meanwhile, and what is not made twice."""

import gc

import numpy as np
import pytest
import torch
from tiny_sessions import KINDS, OTHER, PICTURE, A, B, make_generator, open_session, take
from torch._subclasses.fake_tensor import FakeTensor

from longtake.errors import ConfigError


def test_a_student_that_keeps_every_frame_says_when_it_is_full():
    generator = make_generator(**KINDS["all frames, bf16"])
    with pytest.raises(ConfigError, match="needs max_frames"):
        generator.open(PICTURE, A)
    session = generator.open(PICTURE, A, max_frames=15)  # 5 latents in whole blocks
    take(session, 3)
    with pytest.raises(ConfigError, match="opened for scenes of 5 latent frames"):
        session.next()
    session.image = OTHER
    assert len(take(session, 3)) == 17


def live_bytes():
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and not isinstance(item, FakeTensor):  # other tests leave some of these
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return len(found), sum(found.values())


@pytest.mark.parametrize(("kind", "history_blocks"), [("plain", 2), ("guided, absolute", 0)])
def test_memory_is_constant_through_changes_and_cuts(kind, history_blocks):
    session = open_session(make_generator(**KINDS[kind]), history_blocks=history_blocks)
    used = []
    for round_ in range(4):
        session.prompt = (A, B)[round_ % 2]
        take(session, 3)
        session.image = OTHER
        take(session, 4)
        used.append(live_bytes() if round_ in (1, 3) else None)
    assert used[1] == used[3]


def test_blocks_that_are_ready_are_taken_back_without_decoding_again(monkeypatch):
    """The same frames; the decoder runs as often as there are blocks, and for older ones as often as it must."""
    from longtake.encoders.sessions import DecoderSession

    generator = make_generator()
    wanted = generator.open(PICTURE, A, history_blocks=6)
    ready = generator.open(PICTURE, A, history_blocks=6, ready_blocks=2)
    frames = [wanted.next() for _ in range(6)]
    assert all(np.array_equal(ready.next(), one) for one in frames)
    made_anew = []
    own = DecoderSession._own

    def watched(self):
        made_anew.append(self._held.after != self.num_latent_frames)
        return own(self)

    monkeypatch.setattr(DecoderSession, "_own", watched)
    for back, anew in ((2, False), (1, False), (4, True)):
        made_anew.clear()
        ready.rewind(back)
        again = [ready.next() for _ in range(back)]
        assert all(np.array_equal(one, other) for one, other in zip(again, frames[-back:], strict=True))
        assert any(made_anew) == anew
    branch = ready.fork()
    branch.rewind(1)
    assert np.array_equal(branch.next(), frames[-1]) and np.array_equal(ready.next(), wanted.next())
