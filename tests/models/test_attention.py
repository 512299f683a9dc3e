"""The attention entry: every kernel and every form of mask gives the same numbers."""

from __future__ import annotations

import importlib.util
import logging
import sys
from types import ModuleType

import pytest
import torch
from tiny_plan import causal_layout, tiny_plan
from torch import Tensor

from longtake.condition import MaskLayout
from longtake.errors import ConfigError
from longtake.models import attention
from longtake.models.attention import attend, backends, make_mask
from longtake.models.execution import Execution
from longtake.rollout.denoise import Denoiser

PLAN = tiny_plan(2, 1)
LAYOUTS = {
    "causal": causal_layout(PLAN, 7),
    "window": causal_layout(PLAN.but(window_frames=5, sink_frames=1), 7),
    "copied sink": causal_layout(PLAN.but(window_frames=3, sink_frames=1), 7),
    "teacher forcing": PLAN.but(window_frames=3, sink_frames=1).teacher_forcing_layout(5),
}


def _tensors(layout: MaskLayout, tokens: int, width: int = 16, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    entries, slots = layout.allowed.shape
    shapes = [(2, count * tokens, 3, width) for count in (entries, slots, slots)]
    q, k, v = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return q, k, v


def _truth(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, tokens: int) -> Tensor:
    """Row by row in float64: softmax over the permitted keys only."""
    q, k, v = (t.double().cpu() for t in (q, k, v))
    out = torch.zeros_like(q)
    for row in range(q.shape[1]):
        slots = allowed[row // tokens].cpu().nonzero().flatten().tolist()
        keys = [slot * tokens + token for slot in slots for token in range(tokens)]
        score = torch.einsum("bnk,bsnk->bns", q[:, row], k[:, keys]) / q.shape[3] ** 0.5
        out[:, row] = torch.einsum("bns,bsnk->bnk", score.softmax(-1), v[:, keys])
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_equals_parts_equals_definition(name: str, rel) -> None:
    # 5 tokens a frame: lengths are no multiple of flex attention's block of 128.
    layout, tokens = LAYOUTS[name], 5
    q, k, v = _tensors(layout, tokens)
    truth = _truth(q, k, v, layout.allowed, tokens)
    with torch.no_grad():
        for flex in (False, True):
            mask = make_mask(layout.allowed, tokens, torch.device("cpu"), flex=flex)
            assert (mask.flex is None) != flex and bool(mask.parts) != flex
            assert rel(attend(q, k, v, mask=mask), truth) < 1e-6
        everything = torch.ones_like(layout.allowed)
        assert rel(attend(q, k, v), _truth(q, k, v, everything, tokens)) < 1e-6
    assert rel(truth, _truth(q, k, v, everything, tokens)) > 1e-2


def test_flex_spans_several_blocks(rel) -> None:
    layout, tokens = LAYOUTS["window"], 60  # 420 queries and keys: 4 blocks of 128
    q, k, v = _tensors(layout, tokens)
    cpu = torch.device("cpu")
    with torch.no_grad():
        parts = attend(q, k, v, mask=make_mask(layout.allowed, tokens, cpu, flex=False))
        assert rel(attend(q, k, v, mask=make_mask(layout.allowed, tokens, cpu, flex=True)), parts) < 1e-6


def test_cpu_goes_part_by_part_and_the_fallback_names_itself_once(monkeypatch, caplog) -> None:
    allowed = LAYOUTS["causal"].allowed
    parts = make_mask(allowed, 2, torch.device("cpu")).parts
    again = torch.zeros_like(allowed)
    for start, end, slots in parts:
        again[start:end, list(slots)] = True
    assert torch.equal(again, allowed) and len(parts) < len(allowed)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    attention.has_triton.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [attention.has_triton() for _ in range(3)] == [False] * 3
    finally:
        attention.has_triton.cache_clear()
    messages = [record.getMessage() for record in caplog.records if "triton" in record.getMessage()]
    assert len(messages) == 1 and "block by block" in messages[0]


@pytest.mark.whole
def test_more_shapes_than_torch_keeps_are_compiled_and_none_runs_eager(monkeypatch, rel) -> None:
    """torch compiles 8 of one function and then runs it as it is, which holds all scores of masked attention."""
    compile, compiled = torch.compile, []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **given: compile(function, backend=backend, **given))
    monkeypatch.setattr(attention, "SHAPES", 12)
    torch._dynamo.reset()
    attention._flex.cache_clear()
    try:
        flex, tokens = attention._flex(True), 5
        for again in (False, True):
            for frames in range(2, 14):
                layout = causal_layout(PLAN, 2 * frames + 1)
                q, k, v = _tensors(layout, tokens)
                mask = make_mask(layout.allowed, tokens, torch.device("cpu"), flex=True)
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
                with torch.no_grad():
                    out = flex(q, k, v, block_mask=mask.flex).transpose(1, 2)
                assert len(compiled) == (12 if again else frames - 1)
        parts = make_mask(layout.allowed, tokens, torch.device("cpu"), flex=False)
        assert rel(out, attend(*_tensors(layout, tokens), mask=parts)) < 1e-6
        with pytest.raises(ConfigError, match="masked attentions of 12 different kinds and sizes"), torch.no_grad():
            flex(q[:1], k[:1], v[:1], block_mask=mask.flex)
        with torch.no_grad():
            flex(q, k, v, block_mask=mask.flex)
        assert len(compiled) == 12 and torch._dynamo.config.recompile_limit < 12  # nobody else's limit
    finally:
        attention._flex.cache_clear()
        torch._dynamo.reset()


def test_one_entry_can_be_replaced_everywhere(tiny_model, tiny_condition, tiny_latents) -> None:
    model = tiny_model()
    calls: list[tuple[int, ...]] = []

    def counting(q: Tensor, k: Tensor, v: Tensor, *, mask: attention.FrameMask | None = None) -> Tensor:
        calls.append(tuple(q.shape))
        return attend(q, k, v, mask=mask)

    x, sigma, condition = tiny_latents(3), torch.zeros(2), tiny_condition(model)
    with torch.no_grad():
        before = model(x, sigma, condition)
        model = model.executed(Execution(attend=counting))
        assert torch.equal(model(x, sigma, condition), before)
        model(x, sigma, condition, causal_layout(PLAN, 3))
        Denoiser(model)(x, sigma, condition, model.new_cache(tiny_plan(2, 1, 3, 0), 2, (4, 6)))
    assert calls == [(2, 18, 2, 16)] * 3 * 2 * model.config.num_layers  # of itself, and of the text


def test_masks_are_made_once_for_a_layout_and_forgotten_with_it(tiny_model, tiny_condition, tiny_latents) -> None:
    model, layout = tiny_model(), causal_layout(PLAN, 3)
    x, sigma, condition = tiny_latents(3), torch.zeros(2), tiny_condition(model)
    with torch.no_grad():
        for _ in range(2):
            model(x, sigma, condition, layout)
        assert len(model._masks) == 1 and len(model._masks[layout]) == 1
        model(x[..., :4], sigma, condition, layout)  # another size of the picture: another mask
        assert len(model._masks[layout]) == 2
    del layout
    assert len(model._masks) == 0


# ---- the choice of a kernel ------------------------------------------------------------------------------------------


def test_a_wrong_kernel_and_one_that_raises_are_left_out(caplog) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v) * 1.05

    def refuses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("head_dim must be 64 or 128")

    place = torch.device("cpu"), torch.float32, 16
    with caplog.at_level(logging.WARNING):
        right = [attention._is_right(attention.Kernel(run.__name__, run), *place) for run in (attend, wrong, refuses)]
    assert right == [True, False, False]
    assert [record.getMessage() for record in caplog.records] == [
        "attention kernel wrong gave a wrong result on cpu and is not used"
    ]


@pytest.mark.parametrize("times, first", [((3.0, 2.0, 9.0), "b"), ((2.05, 2.0, 9.0), "a"), ((3.0, 2.0, 1.0), "c")])
def test_the_fastest_kernel_is_chosen_once_and_ties_go_to_the_first(times, first, monkeypatch) -> None:
    calls: list[str] = []

    def milliseconds(run, problem):
        calls.append(run)
        return times["abc".index(run)]

    monkeypatch.setattr(attention, "milliseconds", milliseconds)
    kernels = [attention.Kernel(name, name) for name in "abc"]  # type: ignore[arg-type]
    every = [*kernels, attention.Kernel("MATH", "none")]  # type: ignore[arg-type]
    assert attention._by_time(every, ())[0].name == first and calls == ["a", "b", "c"]  # type: ignore[arg-type]


def test_without_flash_attention_4_that_is_said_once(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    attention._flash4.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [attention._flash4() for _ in range(3)] == [None] * 3
    finally:
        attention._flash4.cache_clear()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "longtake[fast]" in messages[0]


def test_flash_attention_4_is_called_as_it_wants_it(monkeypatch, rel) -> None:
    module = ModuleType("flash_attn.cute")
    module.flash_attn_func = lambda q, k, v: (attend(q, k, v), None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    attention._flash4.cache_clear()
    try:
        kernel = attention._flash4()
        assert kernel is not None and attention._is_right(kernel, torch.device("cpu"), torch.float32, 16)
    finally:
        attention._flash4.cache_clear()


@pytest.mark.whole
@pytest.mark.parametrize("ms, expected", [((3.0, 2.0), True), ((2.0, 3.0), False), ((2.0, None), False)])
def test_masks_go_the_way_that_was_faster(ms, expected, monkeypatch, caplog) -> None:
    def milliseconds(run, problem):
        time = ms[run.keywords["mask"].flex is not None]
        if time is None:
            raise RuntimeError("no code for this device")
        return time

    monkeypatch.setattr(attention, "milliseconds", milliseconds)
    monkeypatch.setattr(attention, "random_problem", lambda *_, **__: (torch.zeros(1),) * 3)
    monkeypatch.setattr(attention, "choose_kernels", lambda *_: None)
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    attention.flex_is_faster.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            found = [attention.flex_is_faster(torch.device("cpu"), torch.bfloat16, 16) for _ in range(2)]
    finally:
        attention.flex_is_faster.cache_clear()
    assert found == [expected] * 2 and len(caplog.records) == 1


# ---- CUDA -----------------------------------------------------------------------------------------------------------

cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestCuda:
    pytestmark = cuda

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_flex_and_parts_agree_forward_and_backward(self, name: str, rel) -> None:
        layout, tokens = LAYOUTS[name], 60
        results = []
        for flex in (False, True):
            q, k, v = (t.requires_grad_() for t in _tensors(layout, tokens, 64, "cuda"))
            mask = make_mask(layout.allowed, tokens, q.device, flex=flex)
            out = attend(q, k, v, mask=mask)
            out.square().sum().backward()
            results.append((out.detach(), q.grad, k.grad, v.grad))
        for parts, flexible in zip(*results):
            assert rel(flexible, parts) < 5e-3  # TF32 may be on inside the compiled kernel
        assert make_mask(layout.allowed, tokens, torch.device("cuda")).flex is not None or not attention.has_triton()

    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float32, 1e-4)])
    def test_chosen_kernels_are_right(self, dtype: torch.dtype, tolerance: float, rel) -> None:
        layout = causal_layout(PLAN, 5)
        q, k, v = (t.to(dtype) for t in _tensors(layout, 40, 128, "cuda"))
        assert backends(torch.device("cuda", 0), dtype, 128)
        truth = _truth(q, k, v, torch.ones_like(layout.allowed), 40)
        assert rel(attend(q, k, v).cpu(), truth) < tolerance
        with torch.no_grad():
            assert rel(attention.attend_fastest(q, k, v).cpu(), truth) < tolerance
        kernels = attention.forward_kernels(q.device, dtype, 128, False)
        assert len(kernels) == 1 or all(kernel.ms > 0 for kernel in kernels)

    @pytest.mark.parametrize("keys", [1500, 300])
    def test_the_fastest_kernels_have_right_gradients(self, keys: int, rel) -> None:
        device, dtype = torch.device("cuda", 0), torch.bfloat16
        attention.choose_kernels(device, dtype, 128)
        shapes = [(2, 700, 3, 128), (2, keys, 3, 128), (2, keys, 3, 128)]
        values = [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n, shape in enumerate(shapes)]
        results = []
        for run, kind in ((attention.attend_fastest, dtype), (attention.defined, torch.float64)):
            q, k, v = (value.to(device, kind).requires_grad_() for value in values)
            out = run(q, k, v)
            out.square().sum().backward()
            results.append((out.detach(), q.grad, k.grad, v.grad))
        assert all(rel(found, truth) < 2e-2 for found, truth in zip(*results))

    def test_masks_by_the_faster_way_are_right(self, rel) -> None:
        layout, device, dtype = LAYOUTS["teacher forcing"], torch.device("cuda", 0), torch.bfloat16
        flex = attention.flex_is_faster(device, dtype, 128)
        q, k, v = (t.to(dtype).requires_grad_() for t in _tensors(layout, 40, 128, "cuda"))
        out = attention.attend_fastest(q, k, v, mask=make_mask(layout.allowed, 40, device, flex=flex))
        assert rel(out.detach().cpu(), _truth(q.detach(), k.detach(), v.detach(), layout.allowed, 40)) < 2e-2

    @pytest.mark.parametrize("rope", ["absolute", "relative"])
    def test_a_streaming_pass_never_waits_for_the_device(self, rope: str, tiny_model, tiny_condition, tiny_latents):
        model = tiny_model(True).cuda()
        condition, x = tiny_condition(model).to("cuda"), tiny_latents(2).cuda()
        zero, cache = torch.zeros(2, device="cuda"), model.new_cache(tiny_plan(2, 1, 6, 2, rope), 2, (4, 6))
        for step in range(5):
            torch.cuda.set_sync_debug_mode("error" if step >= 3 else "default")
            try:
                with torch.no_grad():
                    Denoiser(model)(x, zero, condition, cache)
                    Denoiser(model)(x, zero, condition, cache, commit=True)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_masked_forward_equals_the_cpu(self, tiny_model, tiny_condition, tiny_latents, rel) -> None:
        model = tiny_model(True)
        condition, x, zero = tiny_condition(model), tiny_latents(5), torch.zeros(2)
        layout = causal_layout(PLAN.but(window_frames=3, sink_frames=1), 5)
        with torch.no_grad():
            truth = model(x, zero, condition, layout)
            out = model.cuda()(x.cuda(), zero.cuda(), condition.to("cuda"), layout).cpu()
        assert rel(out, truth) < 5e-3
