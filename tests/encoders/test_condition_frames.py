"""`y` that is encoded as far as it is read."""

import threading

import pytest
import torch
from toy_assets import random_encoders

from longtake.encoders.condition import ConditionFrames, condition_frames
from longtake.encoders.vae import EncoderSession, VideoVAE

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return random_encoders(0).vae


def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_y_grows_in_place_and_equals_one_shot(vae):
    whole = condition_frames(vae, pictures())
    y = ConditionFrames(vae, pictures())
    frames, place = y.frames, y.frames.data_ptr()
    assert frames.shape == whole.shape and y.reached == 1
    for reach in (1, 5, 3, 9, 1000):
        y.reach(reach)
        made = y.reached
        assert torch.equal(frames[:, :made], whole[:, :made]) and (frames[:, made:] == 0).all()
    assert y.reached == whole.shape[1] == vae.steady_index + 1 and y.frames.data_ptr() == place


def test_nothing_is_encoded_twice_or_ahead(vae, monkeypatch):
    encode, calls = EncoderSession.encode, []

    def counted(self, video):
        calls.append(video.shape[1])
        return encode(self, video)

    _ = vae.steady_index
    monkeypatch.setattr(EncoderSession, "encode", counted)
    y = ConditionFrames(vae, pictures(), num_latent_frames=4)
    assert calls == [1] and y.frames.shape[1] == 4
    threads = [threading.Thread(target=y.reach, args=(3,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1, 4, 4]
    y.reach(9)
    assert calls == [1, 4, 4, 4]


def test_a_reach_that_is_interrupted_can_be_made_again(vae, monkeypatch):
    whole, encode, left = condition_frames(vae, pictures(), 5), EncoderSession.encode, [3]

    def interrupted(self, video):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return encode(self, video)

    y = ConditionFrames(vae, pictures(), 5)
    with monkeypatch.context() as patch:
        patch.setattr(EncoderSession, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            y.reach(5)
    y.reach(5)
    assert torch.equal(y.frames, whole)
