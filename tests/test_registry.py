"""Which code runs on CUDA: compiled kernels before Triton, unless SCRIMP_CUDA_IMPL=triton asks; how ops are called. On
throw-away ops."""

import importlib.machinery
import itertools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import scrimp
from scrimp import _registry

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
numbers = itertools.count()


@pytest.fixture(autouse=True)
def _own_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops of a test leave no trace but their name in the dispatcher."""
    monkeypatch.setattr(_registry, "OPS", {})
    monkeypatch.delenv("SCRIMP_CUDA_IMPL", raising=False)


def adding(number: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x + number


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """make(compiled=, triton=) registers an op with those kernels: the reference adds 1, C++ 10, Triton 100."""
    libraries = []

    def register(compiled: bool, triton: bool, **options: Any) -> Any:
        name = f"throw_away_{next(numbers)}"
        if compiled:
            libraries.append(torch.library.Library("scrimp", "FRAGMENT"))
            libraries[-1].impl(name, adding(10), "CUDA")
        if triton:
            module = types.ModuleType(f"scrimp.kernels.{name}")
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
            module.launches = lambda x: (x + 100, [])  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)
        _registry.register(name, "(Tensor x) -> Tensor", fake=adding(0), reference=adding(1), **options)
        return _registry.OPS[name]

    return register


def test_gradients_are_asked_for_before_they_are_refused(make: Callable[..., Any]) -> None:
    op, x = make(compiled=False, triton=False), torch.zeros((), requires_grad=True)
    with pytest.raises(RuntimeError, match="has no backward"):
        op.run(x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y = op.run(x)
        assert y.item() == 1
        assert not y.requires_grad


def on_cuda(op: Any) -> float:
    """What the kernel of the CUDA key returns; it runs on a CPU tensor here."""
    return op.call.redispatch(CUDA, torch.zeros(())).item()


@pytest.mark.parametrize(
    ("compiled", "triton", "wish", "runs", "result", "order"),
    [
        (True, True, None, "CUDA C++", 10, ["cuda-c++", "cuda-triton"]),
        (True, True, "triton", "Triton", 100, ["cuda-triton", "cuda-c++"]),
        (True, False, None, "CUDA C++", 10, ["cuda-c++"]),
        (True, False, "triton", "CUDA C++", 10, ["cuda-c++"]),
        (False, True, None, "Triton", 100, ["cuda-triton"]),
        (False, False, None, "reference (plain torch): no kernel exists", 1, []),
    ],
)
def test_choice(make, monkeypatch, compiled, triton, wish, runs, result, order) -> None:
    if wish:
        monkeypatch.setenv("SCRIMP_CUDA_IMPL", wish)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op = make(compiled, triton)
    assert on_cuda(op) == result
    assert scrimp.which(op.name)["cuda"].split(";")[0] == runs
    assert op.call(torch.zeros(())).item() == 1
    assert [name for name in scrimp.implementations(op.name) if name.startswith("cuda")] == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.cpu)
    found = {name: run for name, run in scrimp.implementations(op.name).items() if name.startswith("cuda")}
    assert list(found) == order
    expected = {"cuda-c++": 10, "cuda-triton": 100}
    assert {name: run(torch.zeros(())).item() for name, run in found.items()} == {n: expected[n] for n in order}


@pytest.mark.parametrize(("wish", "results"), [(None, [10, 99]), ("triton", [100, 99])])
def test_triton_serves_what_compiled_kernels_do_not_take(make, monkeypatch, wish, results) -> None:
    if wish:
        monkeypatch.setenv("SCRIMP_CUDA_IMPL", wish)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op = make(compiled=True, triton=True, cuda_takes=lambda x: x.item() >= 0)
    assert [op.call.redispatch(CUDA, torch.tensor(x)).item() for x in (0.0, -1.0)] == results
    assert scrimp.which(op.name)["cuda"].startswith("Triton" if wish else "CUDA C++")
    assert op.cuda["cuda-c++"](torch.tensor(-1.0)).item() == (9 if wish else 99)


def test_compiled_kernels_alone_get_everything(make) -> None:
    op = make(compiled=True, triton=False, cuda_takes=lambda x: False)
    assert on_cuda(op) == 10


def test_a_wish_that_does_not_exist(make, monkeypatch) -> None:
    monkeypatch.setenv("SCRIMP_CUDA_IMPL", "cuda")
    with pytest.raises(RuntimeError, match="SCRIMP_CUDA_IMPL=cuda cannot be met: the only choice is 'triton'"):
        make(compiled=False, triton=False)
