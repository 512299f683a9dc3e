"""Any number of sessions share a generator in any number of threads: each gives the frames that it gives alone."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny_sessions import OTHER, PICTURE, A, B, C, make_generator

from longtake.encoders.bundle import Encoders
from longtake.encoders.vae import VideoVAE
from longtake.rollout.cuda_graphs import CUDAGraphRunner

LOOKS = ((PICTURE, A, B), (OTHER, B, C), (PICTURE[:, ::-1], C, A))


def make(generator, number, blocks, stream=None):
    """The frames of a session with two changes of prompt and a cut."""
    image, first, second = LOOKS[number]
    made = []
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        session = generator.open(image, first, seed=number, history_blocks=0)
        for block in range(blocks):
            if block in (blocks // 4, 3 * blocks // 4):
                session.prompt = second if block == blocks // 4 else first
            elif block == blocks // 2:
                session.image = LOOKS[number - 1][0]
            made.append(session.next())
    return np.concatenate(made)


def make_together(generator, blocks, streams=(None, None, None)):
    begin = threading.Barrier(3)

    def work(number):
        begin.wait()
        return make(generator, number, blocks, streams[number])

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(work, range(3)))


def test_three_threads_give_what_each_gives_alone():
    generator = make_generator(guidance=2.0)
    expected = [make(generator, number, 5) for number in range(3)]
    for made, alone in zip(make_together(generator, 5), expected, strict=True):
        assert np.array_equal(made, alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("own_streams", [False, True])
def test_recorded_sessions_of_three_threads(own_streams, monkeypatch):
    """LONGTAKE_TRIALS (3) times three threads of 60 blocks each; needs diffusers, transformers and pydantic."""
    monkeypatch.setattr("longtake.models.execution.has_triton", lambda: False)  # compiling takes minutes
    generator = make_generator(precision="bf16")
    old = generator.encoders
    for part in (generator.model, old.vae.module, old.text.model, old.image.model):
        part.cuda()
    generator.encoders, generator.device = Encoders(VideoVAE(old.vae.module), old.text, old.image), torch.device("cuda")

    def refuse(work):
        raise RuntimeError("not captured, for comparison")

    generator.denoiser.graphs = CUDAGraphRunner(refuse)
    expected = [make(generator, number, 60) for number in range(3)]
    for trial in range(int(os.environ.get("LONGTAKE_TRIALS", "3"))):
        graphs = generator.denoiser.graphs = CUDAGraphRunner()
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() if own_streams else None for _ in range(3)]
        for number, made in enumerate(make_together(generator, 60, streams)):
            assert np.array_equal(made, expected[number]), (trial, number)
        assert not graphs._broken
