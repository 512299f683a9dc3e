"""The real transformer, its cache and objectives on two gloo ranks (FSDP2) against one process."""

import json

import dit_run
import pytest
import torch
from forked_ranks import torchrun
from safetensors.torch import load_file

from longtake.parallel.mesh import Mesh
from longtake.run_folder import exported_weights, latest_checkpoint
from longtake.train.metrics import read_rows


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dit_run.run(folder, Mesh())
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(2, dit_run.__file__, folder)
    assert done.returncode == 0, done.stderr
    return folder


def seen(folder, what):
    return [json.loads(path.read_text())[what] for path in sorted(folder.glob("rank*.json"))]


def metrics(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(("seconds", "speed"))} for row in rows]


def weights(folder):
    return load_file(exported_weights(latest_checkpoint(folder / "checkpoints")) / "model.safetensors")


@pytest.mark.parametrize("variant", ["dmd", "dmd_recomputed", "causal", "causal_recomputed"])
def test_losses_gradients_and_updates_of_two_ranks_are_those_of_one(one, two, variant):
    """Recomputed activations must not change them either, with frames evicted between forward and backward."""
    kind = variant.partition("_")[0]
    mine, theirs = metrics(two / variant), metrics(one / kind)
    assert len(mine) == len(theirs) == 2
    networks = ("generator", "critic") if kind == "dmd" else ("generator",)
    names = {f"{network}_{what}" for network in networks for what in ("loss", "grad_norm")}
    assert names <= mine[0].keys() and all(theirs[0][name] > 0 for name in names)
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    trained, wanted = weights(two / variant), weights(one / kind)
    before = dit_run.make_dit(0).state_dict()
    assert trained.keys() == wanted.keys() == before.keys()
    moved = max((wanted[key] - before[key]).abs().max() for key in before)
    assert moved > 5e-4 and all((trained[key] - wanted[key]).abs().max() < 1e-5 for key in before)


@pytest.mark.parametrize("kind", ["dmd", "causal"])
def test_one_exit_step_for_all_ranks_and_other_noise_for_each_sample(one, two, kind):
    (alone,), ranks = seen(one, kind), seen(two, kind)
    turns = {"dmd": [("generator", 0), ("critic", 0), ("critic", 1)], "causal": [("generator", 0), ("generator", 1)]}
    for a, b, turn in zip(*ranks, turns[kind], strict=True):
        assert turn == (a["turn"], a["step"]) == (b["turn"], b["step"])
        # Equally many forwards, as the collectives of a sharded generator need.
        assert a["exit_step"] == b["exit_step"] and a["calls"] == b["calls"]
        assert not set(a["indices"]) & set(b["indices"])
    # Three blocks to the exit step, context passes of the picture and two blocks; step 0 shares one roll-out.
    exits = [call["exit_step"] for call in ranks[0]]
    if kind == "dmd":
        assert [call["calls"] for call in ranks[0]] == [3 * (exits[0] + 1) + 3, 0, 3 * (exits[2] + 1) + 3]

    def noise(calls):
        found = {}
        for call in calls:
            if call["inputs"] is not None:
                found |= {(call["step"], i): tuple(x) for i, x in zip(call["indices"], call["inputs"], strict=True)}
        return found

    whole = noise(alone)
    assert len(whole) == 8 == len(set(whole.values()))
    assert noise(ranks[0]) | noise(ranks[1]) == whole


def test_the_clock_is_exact_when_a_sharded_model_computes_in_bfloat16(two):
    """Wan's clock under FSDP mixed precision (N.10): 937.5 must not become 936."""
    for calls in seen(two, "clocks"):
        assert len(calls) == 2
        for call in calls:
            exact = 1000 * torch.tensor(call["sigma"], dtype=torch.float64)  # the float32 levels, exactly
            clock = torch.tensor(call["clock"], dtype=torch.float64).reshape(2, -1)
            assert call["dtype"] == "torch.float64" and call["out"] == "torch.float32"
            assert torch.equal(clock, exact.reshape(2, -1).expand_as(clock))
            assert (clock.bfloat16().double() != clock).all()
            assert call["matrices"] == "torch.bfloat16" and 1e-4 < call["error"] < 0.05


def test_a_roll_out_gathers_sharded_weights_once_and_sees_what_changed_between_two(two):
    """The numbers are compared with a process of its own in `dit_run.gathers`."""
    units = 2 + 1  # blocks, and the rest
    for counts in seen(two, "gathers"):
        assert counts["once"] == [units, units]
        assert counts["each pass"][0] == counts["each pass"][1] > 5 * units


def test_a_cached_roll_out_of_two_ranks_is_that_of_one(one, two):
    whole = load_file(one / "rank0.safetensors")
    parts = [load_file(two / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert not parts[0].keys() & parts[1].keys() and len(whole) == dit_run.BATCH
    for index, latents in (parts[0] | parts[1]).items():
        torch.testing.assert_close(latents, whole.pop(index), rtol=0, atol=1e-6)
    assert not whole
    # One projection of the condition for a layer and roll-out: every later call used the kept keys and values.
    assert seen(one, "projections") == [[1, 1, 1, 1]] and seen(two, "projections") == [[1, 1], [1, 1]]
