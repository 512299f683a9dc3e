"""Several GPUs beside one, rehearsed with two CPU ranks: what is learnt and shown alike, and what is told of it."""

import json
from pathlib import Path

import pytest
from forked_ranks import torchrun

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "side_by_side.py"
SMALL = ["micro_batch_size=1", "video.height=32", "video.width=32", "video.num_latent_frames=5", "validate_every=0"]


def side_by_side(folder, *words, ranks=2):
    file = folder / "found.json"
    done = torchrun(ranks, PROGRAM, *words, "--device", "cpu", "--json", file)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text()), done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_training_in_all_ways(tmp_path):
    words = ["toy/distill", *SMALL, "parallel.fused_shards=true", f"logdir={tmp_path}/run"]
    found, said = side_by_side(tmp_path, *words, "--steps", "2")
    alone, *others = (
        found[way] for way in ("one GPU", "a sample each", "sharded, a sample each", "together, one sample")
    )
    assert said.count("one GPU: samples_per_s") == 1  # the first rank speaks
    for way in others:
        assert way["skipped_updates"] == 0 and len(way["rank_peak_gib"]) == 2
        assert way["times one GPU"] == pytest.approx(way["samples_per_s"] / alone["samples_per_s"])
    shared = [(way["shared"]["samples_at_once"], way["shared"]["ranks_a_sample"]) for way in (alone, *others)]
    assert shared == [(1, 1), (2, 1), (2, 1), (1, 2)]
    assert [way["shared"]["weights"][:5] for way in others] == ["whole", "shard", "whole"]
    whole, sharded, together = others
    assert together["first"] == pytest.approx(alone["first"], rel=1e-4) and len(alone["first"]) == 5
    assert sharded["first"] == pytest.approx(whole["first"], rel=1e-4) != together["first"]
    needs = {way: said["gib"] for way, said in found["doctor"].items()}
    assert len(needs) == 4 and needs["sharded, a sample each"] < needs["one GPU"] < needs["a sample each"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_gpu_with_one_shard_beside_whole_weights(tmp_path):
    words = ["toy/distill", *SMALL, f"logdir={tmp_path}/run", "--steps", "2", "--ways", "one,sharded"]
    found, _ = side_by_side(tmp_path, *words, ranks=1)
    whole, shard = found["one GPU"], found["sharded, a sample each"]
    assert shard["shared"]["weights"] == "sharded over 1 ranks" and whole["shared"]["weights"] == "whole on each rank"
    assert shard["first"] == pytest.approx(whole["first"], rel=1e-4) and len(whole["first"]) == 5
    assert shard["times one GPU"] == shard["samples_per_s"] / whole["samples_per_s"]
    assert list(found["doctor"]) == ["one GPU"]  # of one shard it would say the same


@pytest.mark.whole
@pytest.mark.timeout(260)
def test_a_stream_in_all_ways(tmp_path):
    found, _ = side_by_side(tmp_path, "--random", "toy", "height=32", "width=32", "--blocks", "1")
    for way in ("decoding beside", "together"):
        assert found[way]["times one GPU"] == found[way]["frames_per_s"] / found["one GPU"]["frames_per_s"]
        assert found[way]["differs_by"]["most"] <= 1
        assert set(found[way]["ms"]) == {"pass 0", "pass 1", "pass 2", "pass 3", "context", "decode"}
    assert len(found["together"]["rank_peak_gib"]) == 2
