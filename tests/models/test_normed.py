"""Sums of the residual stream and their norms in one pass: which kernels are used, and that they are right."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

import longtake.models
from longtake.models import layers
from longtake.models.fp8 import FP8, Rows
from longtake.models.layers import added_then_modulated, gated_then_modulated, gated_then_normed
from longtake.models.norms import in_one_pass

FUNCTIONS = (gated_then_modulated, gated_then_normed, added_then_modulated)
CPU = torch.device("cpu")


def chosen(kernel, function, dtype, monkeypatch):
    """What is used where this one is the kernel for a function."""
    module = SimpleNamespace(**{function.__name__: kernel})
    monkeypatch.setitem(sys.modules, "longtake.models.normed_triton", module)
    monkeypatch.setattr(longtake.models, "normed_triton", module, raising=False)
    in_one_pass.cache_clear()
    return in_one_pass(function, CPU, dtype)


@pytest.fixture(autouse=True)
def forgotten():
    yield
    in_one_pass.cache_clear()


def made_wrong(function, part):
    """A kernel that does one thing wrong."""

    def kernel(x, made, *given):
        if part == "vectors of frames":
            given = [v.roll(1, -1) if isinstance(v, torch.Tensor) else v for v in given]
        if part == "nothing added":
            made = made * 0
        total, normed = function(x, made, *given)
        if part == "sum":
            total = x
        if part == "scale" and isinstance(normed, Rows):
            normed = Rows(normed.values, normed.scale * 1.1)
        elif part == "scale":
            normed = normed * 1.1
        return (total * float("nan") if part == "not finite" else total), normed

    return kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_right_kernel_is_used_and_a_wrong_one_is_not(function, dtype, monkeypatch, caplog):
    assert chosen(function, function, dtype, monkeypatch) is function
    for part in ("vectors of frames", "nothing added", "sum", "scale", "not finite"):
        with caplog.at_level(logging.WARNING):
            assert chosen(made_wrong(function, part), function, dtype, monkeypatch) is None, part
        assert f"{function.__name__} is off" in caplog.text
        caplog.clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (FP8, 5e-3)])
@pytest.mark.parametrize("width", [48, 1536, 5120])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_kernels_are_right(function, width, dtype, most, rel):
    from longtake.models import normed_triton

    generator = torch.Generator().manual_seed(0)
    x, made, modulation = (torch.randn(2, 3, n, width, generator=generator).cuda() for n in (50, 50, 6))
    vectors = modulation.unsqueeze(3).unbind(2)
    if function is gated_then_normed:
        given = (vectors[2], vectors[3][0, 0, 0], vectors[4][1, 1, 0])
    else:
        given = vectors[1:4] if function is gated_then_modulated else vectors[4:]
    found = []
    for run in (getattr(normed_triton, function.__name__), getattr(layers, function.__name__)):
        total, normed = run(x, made.bfloat16(), *given, 1e-6, dtype)
        normed = normed.values.double() * normed.scale if isinstance(normed, Rows) else normed.double()
        found.append((total, normed))
    assert rel(found[0][0], found[1][0]) < 1e-6
    assert rel(found[0][1], found[1][1]) < most
    x[0, 1, 7, 3] = float("nan")  # shows in its row and in no other
    _, normed = getattr(normed_triton, function.__name__)(x, made.bfloat16(), *given, 1e-6, dtype)
    normed = normed.values.float() * normed.scale if isinstance(normed, Rows) else normed
    finite = normed.isfinite().all(-1)
    assert not finite[0, 1, 7] and int(finite.sum()) == finite.numel() - 1
