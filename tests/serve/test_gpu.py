"""The server on a GPU: the frames of a stream that is made alone, with captured graphs, and a history."""

import gc
import mmap

import numpy as np
import pytest
import torch
from live_server import LiveClient, serving
from tiny_sessions import A, B, C

from longtake.inference.generator import Generator
from longtake.inference.host_copies import cuda_page_lock
from longtake.inference.source import Source
from longtake.serve.capacity import fill_history
from longtake.toy.world import sample_world

pytestmark = pytest.mark.gpu


def test_sessions_are_those_of_python(tmp_path):
    generator = Generator.build(Source.of_model("toy"), "cuda")
    picture = sample_world(3, 0).render(1)[0]
    sessions = {seed: generator.open(picture, A, seed=seed, history_blocks=8) for seed in (1, 2)}
    wanted = {seed: [np.concatenate([session.next() for _ in range(5)])] for seed, session in sessions.items()}
    for seed, session in sessions.items():
        session.prompt = B
        wanted[seed].append(np.concatenate([session.next() for _ in range(3)]))
    with serving(generator, tmp_path, begins_in=250, max_sessions=2) as address:  # compiles first
        for seed in sessions:
            client = LiveClient(address)
            client.open(A, picture, seed=seed)
            seen = client.watch(65)
            client.post("/pause")
            blocks = (client.request("GET").json()["frame"] - 65) // 16
            if blocks:
                client.post("/rewind", json={"to_frame": 65})
            client.post("/prompt", json={"prompt": B})
            client.post("/resume")
            seen = client.watch(113, seen=seen)
            assert np.array_equal(seen.pictures()[:113], np.concatenate(wanted[seed]))


def test_the_way_back_lies_in_pinned_memory():
    generator = Generator.build(Source.of_model("toy"), "cuda")
    session = generator.open(
        sample_world(3, 0).render(1)[0], A, seed=1, history_blocks=8, ready_blocks=3, history_caches=2
    )
    asked = {4: B, 8: C}

    def block(number):
        session.prompt = asked.get(number, session.prompt)
        return session.next()

    frames = [block(number) for number in range(4)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    frames += [block(number) for number in range(4, 12)]
    torch.cuda.synchronize()
    cache = session.state.stream.cache
    assert torch.cuda.memory_allocated() - before < cache.size_bytes  # no second one for the changes
    assert session.host_bytes > cache.size_bytes
    assert all(kept.is_pinned() for kept in session._past._kept.values())
    for back in (2, 8, 5):
        session.rewind(back)
        for number in range(12 - back, 12):
            assert np.array_equal(block(number), frames[number])


def test_pages_are_locked_before_the_first_viewer_and_not_again():
    generator, picture = Generator.build(Source.of_model("toy"), "cuda"), sample_world(3, 0).render(1)[0]
    kept = {"history_blocks": 8, "ready_blocks": 3, "history_caches": 2}
    fill_history(generator.open(picture, A, seed=1, **kept))
    gc.collect()
    pool = generator.copies.pool
    pool.make_ready(1)
    made, by_torch = pool.size_bytes, torch.cuda.host_memory_stats()["allocated_bytes.current"]
    session = generator.open(picture, A, seed=1, **kept)

    def block(number):
        session.prompt = (A, B, C)[number // 3 % 3]
        return session.next()

    frames = [block(number) for number in range(20)]
    for back in (1, 6):
        session.rewind(back)
        for number in range(20 - back, 20):
            assert np.array_equal(block(number), frames[number])
    assert pool.size_bytes == made > session.host_bytes > 0
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] - by_torch < 16 << 20  # frames on their way


def test_pages_are_locked_and_unlocked():
    pages = mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = np.frombuffer(pages, np.uint8)
    unlock = cuda_page_lock(memory, torch.device("cuda", 0))
    assert torch.from_numpy(memory).is_pinned()
    unlock()
    assert not torch.from_numpy(memory).is_pinned()
