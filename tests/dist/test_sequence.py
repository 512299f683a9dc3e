"""Sequence parallelism on gloo ranks: exchanges and their gradients, every use of the transformer, caches, errors."""

import json

import pytest
import sequence_run
import torch
from fake_ranks import FakeMesh
from forked_ranks import torchrun
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model

from longtake.config.groups import ParallelConfig
from longtake.parallel.mesh import Mesh
from longtake.errors import ConfigError
from longtake.models.execution import Execution


def ranks_of(folder, ranks):
    done = torchrun(ranks, sequence_run.__file__, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def seen(request, tmp_path_factory):
    found = ranks_of(tmp_path_factory.mktemp("sequence"), request.param)
    assert len(found) == request.param
    return found


@pytest.mark.parametrize("tokens", sequence_run.SIZES)
def test_exchanges_and_their_gradients_are_exact(seen, tokens):
    for rank in seen:
        assert len(rank[tokens]["exchanges"]) == 9
        assert all(rank[tokens]["exchanges"].values()), rank[tokens]["exchanges"]


@pytest.mark.parametrize("tokens", sequence_run.SIZES)
def test_every_use_of_the_transformer_equals_one_process(seen, tokens):
    """Outputs, and gradients after the mean over ranks: whole clips, masks, caches that evict, recomputation."""
    for rank in seen:
        errors = rank[tokens]["passes"]
        assert sum("gradients" in name for name in errors) == 16 and len(errors) == 34
        for name, error in errors.items():
            # A wrong factor in a gradient would be an error of one half or more.
            assert error < (8e-2 if name.startswith("bfloat16") else 1e-5), (name, error)


def test_a_layer_takes_two_exchanges(seen):
    assert all(rank["all-to-alls a layer"] == 2 for rank in seen)


def test_a_cache_holds_the_heads_of_its_rank_and_keeps_its_rules(seen):
    for rank in seen:
        assert rank["cache"]["error"] < 1e-6 and rank["cache"]["shard of bytes"] == 1 / len(seen)
        assert rank["cache"]["refused"]


def test_passes_are_replayed_on_all_ranks_or_on_none(seen):
    for rank in seen:
        found = rank["recorded"]
        assert found["equal"] and found["replayed"] >= 6
        assert found["equal where a rank cannot"] and found["given up"]
        assert found["agree"] == [True, False]


def test_what_cannot_be_shared_is_refused_and_what_can_is_named(seen):
    ranks = len(seen)
    heads = {2: "3 heads cannot be divided over 2 ranks", 4: "5 heads cannot be divided over 4 ranks"}[ranks]
    for rank in seen:
        assert heads in rank["error: heads"] and f"to one of 1, {ranks + 1}" in rank["error: heads"]
        assert f"{ranks - 1} tokens a frame cannot be split over {ranks} ranks" in rank["error: tokens"]


class TwelveWays:
    size, leads = 5, True


def test_the_heads_of_the_published_sizes():
    with pytest.raises(ConfigError, match="12 heads .* over 5 ranks .* one of 1, 2, 3, 4, 6, 12$"):
        make_tiny_model(num_heads=12, dim=48).executed(Execution(TwelveWays()))
    with pytest.raises(ConfigError, match="one of 1, 2, 4, 5, 8, 10, 20, 40$"):
        TwelveWays.size = 3
        make_tiny_model(num_heads=40, dim=80).executed(Execution(TwelveWays()))


def test_ranks_are_divided_or_refused():
    for parallel, world_size, shape in (
        ((1, 1), 1, (1, 1)),
        ((2, 2), 8, (2, 4)),
        ((1, 4), 4, (1, 1)),
        ((3, 1), 6, (2, 6)),
    ):
        kind = "hsdp" if parallel[0] > 1 else "fsdp"
        one = ParallelConfig(data_parallel=kind, replicate=parallel[0], sequence=parallel[1])
        assert (one.shard(world_size), one.data_ranks(world_size)) == (shape[0], shape[0] * parallel[0])
    with pytest.raises(ConfigError, match="= 4 must divide the number of ranks, 6; .* start a multiple of 4 ranks"):
        ParallelConfig(data_parallel="hsdp", replicate=2, sequence=2).shard(6)
    with pytest.raises(ConfigError, match="number of ranks, 1;"):
        Mesh().arranged(ParallelConfig(sequence=2))
    mesh = FakeMesh(1, 2)
    assert mesh.arranged(ParallelConfig()) is mesh and (mesh.data_rank, mesh.num_data_ranks) == (1, 2)


def test_one_process_does_nothing_more(monkeypatch):
    """No group, no copy: the tensors of attention are those of the projections."""
    from longtake.models.sequence_parallel import NO_SPLIT

    x = torch.randn(1, 2, 3, 4)
    assert NO_SPLIT.shard(x) is NO_SPLIT.all_gather(x) is NO_SPLIT.to_tokens(x) is x
    assert all(a is b for a, b in zip(NO_SPLIT.to_heads(x, x, x), (x, x, x)))
    model = make_tiny_model()
    assert model.execution.split is None and Mesh().sequence is None and Mesh().leads_sequence
    monkeypatch.setattr(torch.distributed, "all_to_all_single", None)
    model(make_tiny_latents(3), torch.ones(2), make_tiny_condition(model))
