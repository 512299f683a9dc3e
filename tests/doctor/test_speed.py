"""The speed model against what operations move, closed forms of its parts, and measurements made up for the purpose."""

import json
from contextlib import nullcontext

import pytest
import torch
from count_bytes import ByteCounter
from tiny_stage import TEACHER, stage_config

from longtake.doctor import speed
from longtake.doctor.calibration import measured_rates
from longtake.doctor.layout import Layout
from longtake.doctor.memory import Networks, trained_count, weight_bytes
from longtake.doctor.rates import rates_of
from longtake.doctor.speed import TRAFFIC, SpeedModel
from longtake.errors import ConfigError
from longtake.models.dit import DiTConfig, VideoDiT
from longtake.models.lora import add_lora, targets_of
from longtake.models.lora_files import Adapter, Base
from longtake.plan import StreamPlan
from longtake.randomness import Draws
from longtake.rollout.denoise import Denoiser
from longtake.rollout.work import clip_call, loras, model_work
from longtake.structs import Condition

ENDLESS = 1e30
NETWORKS = Networks(TEACHER, TEACHER, TEACHER)


# ---- bytes that operations move ---------------------------------------------------------------------------------------
def moved(precision, *, dim, ffn, side=8, layers=2, past=0, rope="relative", graded=True, rank=0):
    """(bytes, calls) of a forward and of its backward."""
    config = DiTConfig(dim, ffn, 2, layers, text_dim=16, text_len=4)
    model, condition = VideoDiT(config), Condition(torch.randn(1, 4, 16))
    if rank:
        pattern = Adapter(rank, float(rank), targets_of(model, None), Base("toy", "0")).pattern
        add_lora(model.cast(torch.bfloat16), pattern, rank, float(rank), Draws(0), "x")
    x, level = torch.randn(1, 2, 16, side, side), torch.full((1,), 0.5)
    bf16 = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if precision == "bf16" else nullcontext()
    with bf16:
        if past:
            cache = model.new_cache(StreamPlan(2, 1, None, 0, rope), 1, (side, side), max_frames=past + 2)
            with torch.no_grad():
                for _ in range(past // 2):
                    Denoiser(model)(x, torch.zeros(1), condition, cache, commit=True)
        with torch.set_grad_enabled(graded), ByteCounter() as ahead:
            velocity = Denoiser(model)(x, level, condition, cache) if past else model(x, level, condition)
    back = ByteCounter()
    if graded:
        with back:
            velocity.sum().backward()
    return {False: (ahead.bytes, ahead.calls), True: (back.bytes, back.calls)}


def of_a_layer(precision, **sizes):
    two, three = (moved(precision, layers=layers, **sizes) for layers in (2, 3))
    return {back: tuple(b - a for a, b in zip(two[back], three[back])) for back in (False, True)}


@pytest.mark.parametrize(("precision", "rank"), [("bf16", 0), ("fp32", 0), ("bf16", 8)])
def test_bytes_of_a_token(precision, rank):
    """Between two numbers of tokens only what is counted a token differs; between two MLPs only M."""
    small, wide = (
        {side: of_a_layer(precision, dim=64, ffn=ffn, side=side, rank=rank) for side in (8, 16)} for ffn in (64, 320)
    )
    tokens = 2 * (64 - 16)
    for back in (False, True):
        traffic = TRAFFIC[precision, back] + (speed.LOW_RANK[back] if rank else speed.Traffic(0, 0, 0, 0))
        first, second = ((sizes[16][back][0] - sizes[8][back][0]) / tokens for sizes in (small, wide))
        hidden = (second - first) / 256
        assert hidden == pytest.approx(traffic.hidden, rel=0.02)
        assert (first - 64 * hidden) / 64 == pytest.approx(traffic.width, rel=0.02)
        assert small[8][back][1] == pytest.approx(traffic.calls, rel=0.1)


@pytest.mark.parametrize(("rope", "graded"), [("relative", True), ("absolute", True), ("relative", False)])
def test_bytes_of_an_attended_token(rope, graded):
    short, far = (of_a_layer("bf16", dim=64, ffn=64, past=past, rope=rope, graded=graded) for past in (2, 6))
    for back in (False, True) if graded else (False,):
        found = (far[back][0] - short[back][0]) / (4 * 16 * 64)
        expected = TRAFFIC["bf16", back].past if rope == "relative" else speed.ABSOLUTE_PAST[back]
        assert found == pytest.approx(expected, abs=4.5)  # a graded call also copies what it gathers


def test_bytes_of_the_copies_of_weights():
    """What does not depend on tokens: each layer's matrices, read in float32 and written in bfloat16."""
    by_side = {side: of_a_layer("bf16", dim=64, ffn=320, side=side)[False][0] for side in (8, 16)}
    constant = by_side[8] - (by_side[16] - by_side[8]) / 3
    matrices = 8 * 64 * 64 + 2 * 64 * 320
    assert constant / matrices == pytest.approx(speed.COPY_BYTES, rel=0.1)


# ---- parts of a step --------------------------------------------------------------------------------------------------
def only(**values):
    """Rates at which everything but `values` takes no time."""
    endless = ("products", "attention_long", "attention_block", "attention_backward", "attention_masked", "memory")
    none = dict.fromkeys(("call", "optimizer_bytes", "hop_node", "hop_network", "overlap"), 0.0)
    links = dict.fromkeys((*endless, "link", "network", "host_link"), ENDLESS)
    factors = {"slowdown": 1.0, "slowdown_blocks": 1.0}
    return rates_of().replaced("assumed", **links | none | factors | values)


def model_of(workshop, tmp_path, stage="distill", layout=None, rates=None, **changes):
    changes = {"precision": "bf16", "batch_size": 8, "micro_batch_size": 1, "ema": {"enabled": False}} | changes
    config = stage_config(workshop, tmp_path, stage, **changes)
    networks = NETWORKS if stage == "distill" else Networks(TEACHER)
    return SpeedModel(config, networks, layout or Layout(1), rates or rates_of(), 17)


def test_products_alone_take_operations_over_rate(workshop, tmp_path):
    model = model_of(workshop, tmp_path, rates=only(products=1e9))
    guess = model.predict()
    sizes = dict.fromkeys(("generator", "critic", "teacher"), TEACHER)
    expected = 0.0
    for update, share in ((True, 0.5), (False, 0.5)):
        work = model_work(model.passes(update), sizes, loras(model.config))
        expected += share * 8 * sum(one.products for one in work.values()) / 1e9
    assert guess.total == pytest.approx(expected)
    assert set(guess.seconds) <= set(speed.PHASES) and guess.seconds["gathers"] == 0
    again = model_of(workshop, tmp_path, rates=only(products=1e9), activation_checkpointing=True).predict()
    assert again.seconds["backward"] > 1.2 * guess.seconds["backward"]
    # What is computed twice counts once, and the context's backward once for all blocks of a roll-out.
    assert 0.95 * guess.model_flops < again.model_flops < guess.model_flops
    assert guess.utilisation == pytest.approx(guess.model_flops / guess.total / 989e12)
    assert guess.samples_per_second == pytest.approx(8 / guess.total)


def test_a_slow_host_decides_where_operations_are_small(workshop, tmp_path):
    guess = model_of(workshop, tmp_path, rates=only(call=1.0)).predict()
    calls = guess.seconds["scores"]
    (ahead, back) = (TRAFFIC["bf16", b].calls * TEACHER.num_layers for b in (False, True))
    # critic and teacher twice in every second iteration, the critic once in each, 8 micro-batches
    assert calls == pytest.approx(8 * ahead * (0.5 * 3 + 1))
    num_graded = 2 * 0.5 + 1  # two blocks of the roll-out, the critic
    assert guess.seconds["backward"] == pytest.approx(8 * back * num_graded)


def test_sharding_gathers_twice_and_reduces_once(workshop, tmp_path):
    """Stage teacher: one graded forward a micro-batch; bytes and seconds of rings inside a node and over nodes."""
    full, size = weight_bytes(TEACHER, "bf16"), 4 * trained_count(TEACHER, None)
    assert full < size
    for gpus, count in ((4, 2), (8, 1)):
        layout = Layout(gpus, gpus_per_node=4)
        guess = model_of(workshop, tmp_path, "teacher", layout, only(link=1e6, network=5e5)).predict()
        sent = count * (2 * full + size) * (gpus - 1) / gpus
        inside, rate = (0, 1e6) if gpus == 4 else (4, min(1e6, 4 * 5e5))
        assert guess.node_bytes + guess.network_bytes == pytest.approx(sent)
        assert guess.network_bytes == pytest.approx(sent / inside if inside else 0)
        assert guess.seconds["gathers"] == pytest.approx(sent / rate)


def test_replicas_reduce_their_own_shards_between_nodes(workshop, tmp_path):
    size = 4 * trained_count(TEACHER, None)
    guess = model_of(workshop, tmp_path, "teacher", Layout(8, 4, replicate=2), only(network=1e6)).predict()
    assert guess.node_bytes == pytest.approx((2 * weight_bytes(TEACHER, "bf16") + size) * 3 / 4)
    assert guess.network_bytes == pytest.approx(2 * (size / 4) * (2 - 1) / 2)
    assert guess.seconds["gathers"] == pytest.approx(guess.network_bytes / 1e6)


def test_sequence_groups_exchange_four_tensors_a_layer(workshop, tmp_path):
    layout, checkpointing = Layout(2, sequence=2), {"activation_checkpointing": True}
    model = model_of(workshop, tmp_path, "teacher", layout, only(link=1e6), **checkpointing)
    call = clip_call(model.config, TEACHER, 1, 17)
    a_call = 4 * call.all_tokens / 2 * TEACHER.dim * 2 * TEACHER.num_layers / 2
    guess, count = model.predict(), 8
    sharded = (2 * weight_bytes(TEACHER, "bf16") + 4 * trained_count(TEACHER, None)) / 2
    assert guess.seconds["exchange"] == pytest.approx(3 * count * a_call / 1e6)  # forward, again, backward
    assert guess.node_bytes == pytest.approx(count * (3 * a_call + sharded))
    alone = model_of(workshop, tmp_path, "teacher", rates=only(products=1e9)).predict()
    shared = model_of(workshop, tmp_path, "teacher", layout, only(products=1e9)).predict()
    assert shared.total == pytest.approx(alone.total / 2)


def test_gathering_hides_behind_computing(workshop, tmp_path):
    slow = {"products": 1e9, "link": 1e9}
    shown, hidden = (
        model_of(workshop, tmp_path, "teacher", Layout(4), only(**slow, overlap=share)).predict()
        for share in (0.0, 1.0)
    )
    assert shown.seconds["gathers"] > 0 == hidden.seconds["gathers"]
    assert shown.total - hidden.total == pytest.approx(shown.seconds["gathers"])


def test_low_rank_updates_send_less(workshop, tmp_path):
    lora = {"lora": {"rank": 2}, "critic": {"lora": {"rank": 2}, "updates_per_generator": 2}}
    full, low = (model_of(workshop, tmp_path, layout=Layout(8), **extra).predict() for extra in ({}, lora))
    assert low.node_bytes < 0.75 * full.node_bytes and low.seconds["optimizer"] < 0.5 * full.seconds["optimizer"]


def test_whole_weights_are_not_gathered_and_a_roll_out_gathers_once(workshop, tmp_path):
    rates = only(link=1e6)
    guesses = {
        name: model_of(workshop, tmp_path, layout=Layout(4, **mesh), rates=rates).predict()
        for name, mesh in {"whole": {"whole": True}, "once": {}, "each": {"gather_once": False}}.items()
    }
    each, once, whole = (guesses[name].node_bytes for name in ("each", "once", "whole"))
    # Critic and, as often as there is an update of it, student: gradients there and back, and nothing else.
    size, every = 4 * trained_count(TEACHER, None), model_of(workshop, tmp_path).config.critic.updates_per_generator
    assert whole == pytest.approx(2 * size * 3 / 4 * (1 + 1 / every))
    accumulation = 2  # 8 samples, one at a time, on 4 ranks
    calls = sum(p.times for p in model_of(workshop, tmp_path).passes(False) if p.phase == "rollout")
    assert each - once == pytest.approx(accumulation * (calls - 1) * weight_bytes(TEACHER, "bf16") * 3 / 4)


def test_a_mesh_of_whole_weights_has_no_replicas():
    layout = Layout(8, sequence=2, whole=True)
    assert (layout.shards, layout.copies, layout.data_ranks) == (1, 8, 4)
    with pytest.raises(ConfigError, match="--replicate 2 has no meaning where each rank keeps whole weights"):
        Layout(8, whole=True, replicate=2)


def test_compile_and_offload(workshop, tmp_path):
    memory = {"memory": 1e9, "host_link": 1e6, "compiled_bytes": 0.5}
    one, compiled = (
        model_of(workshop, tmp_path, "teacher", Layout(1, compile=on), only(**memory), precision="fp32").predict()
        for on in (False, True)
    )
    assert compiled.total == pytest.approx(one.total / 2, rel=1e-3)
    offloaded = model_of(workshop, tmp_path, "teacher", Layout(1, cpu_offload=True), only(**memory)).predict()
    assert offloaded.seconds["optimizer"] == pytest.approx(8 * trained_count(TEACHER, None) / 1e6)


# ---- constants --------------------------------------------------------------------------------------------------------
def test_constants_name_how_they_are_known():
    rates = rates_of()
    assert rates.is_calibrated and {one.known for one in rates.table.values()} == {"measured", "assumed"}
    assert all(f"| `{name}` |" in rates.markdown() for name in rates.table)
    older = rates_of("NVIDIA A100-SXM4-80GB")
    assert older["products"] == pytest.approx(782e12 * 312 / 989) and older["network"] == rates["network"]
    assert not older.is_calibrated and {one.known for one in older.table.values()} == {"assumed"}
    with pytest.raises(ConfigError, match="--device TPU is not in the table"):
        rates_of("TPU")


def test_calibration_makes_the_sums_of_measured_updates_right(workshop, tmp_path):
    """Calls of whole clips took 1.5 times what is counted, those of roll-outs twice."""
    config = stage_config(workshop, tmp_path, "distill", precision="bf16", batch_size=1, micro_batch_size=1)
    counted = rates_of().replaced("assumed", slowdown=1.0, slowdown_blocks=1.0)
    model = SpeedModel(config, NETWORKS, Layout(1), counted, 17)

    def seconds(found):
        return sum(
            (2.0 if each.phase == "rollout" else 1.5)
            * each.times
            * (model.forward_seconds(each) + (model.backward_seconds(each) if each.graded else 0.0))
            for each in found
        )

    update, alone = model.passes(True, 1.0), model.passes(False, 1.0)
    measured = {
        "generator update": {"1": seconds(update[:-1])},
        "critic update on the same clips": {"1": seconds(update[-1:])},
        "critic update": {"1": seconds(alone)},
    }
    training = {"config": config.model_dump(), "network": TEACHER.to_dict(), "seconds by exit step": measured}
    kernels = {"matmul 64^3, TFLOP/s": 782.0, "attention, 4 frames to 13, TFLOP/s": 582.0, "attention kernels": ["A"]}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rates": kernels, "train, window 5, sink 1": training}))
    rates = measured_rates(rates_of(), file)
    assert rates.is_calibrated and rates["slowdown"] == pytest.approx(1.5)
    assert rates["slowdown_blocks"] == pytest.approx(2.0)
    assert rates.table["attention_block"].known == "measured" and rates["attention_long"] == 569e12
    file.write_text(json.dumps({"rates": {**kernels, "attention, 21 frames to 21, TFLOP/s": 1.0}}))
    rates = measured_rates(rates_of("H100"), file)  # no training in it
    assert not rates.is_calibrated and rates["attention_long"] == 1e12
    for text, reason in (("{", "cannot be read"), ('{"machine": 1}', "neither `rates` nor a training")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            measured_rates(rates_of(), file)
