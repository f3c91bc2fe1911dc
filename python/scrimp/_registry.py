"""Registration of ops with the dispatcher, and the answer to "which code runs?".

`register` defines the schema in Python; C++ and CUDA implementations registered themselves when `_ext` loaded the
library, and a Triton kernel is bound to the CUDA key where no CUDA C++ exists, so the reference is what the dispatcher
falls back to where no kernel exists. `SCRIMP_CUDA_IMPL=triton` asks for Triton where both exist.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import _ext

_library = torch.library.Library("scrimp", "FRAGMENT")


@dataclass(frozen=True)
class Op:
    """One registered op: its dispatcher handle and its plain-torch reference."""

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]


OPS: dict[str, Op] = {}
_triton_bound: set[str] = set()


def _wanted_cuda() -> str | None:
    wish = os.environ.get("SCRIMP_CUDA_IMPL")
    if wish not in (None, "triton"):
        raise RuntimeError(f"SCRIMP_CUDA_IMPL={wish} cannot be met: the only choice is 'triton'")
    return wish


def _find_triton(name: str) -> Callable[..., Any] | None:
    """Runs `scrimp.kernels.<name>`, importing it (and triton) at the first call; None where there is no such file."""
    if importlib.util.find_spec(f"scrimp.kernels.{name}") is None:
        return None

    @functools.cache
    def module() -> Any:
        try:
            return importlib.import_module(f"scrimp.kernels.{name}")
        except ModuleNotFoundError as error:
            raise RuntimeError(f"scrimp::{name} on a GPU needs triton (pip install triton): {error}") from error

    def run(*args: Any) -> Any:
        results, launches = module().launches(*args)
        for launch in launches:
            launch.run()
        return results

    return run


def register(name: str, schema: str, *, fake: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """Defines `scrimp::<name>` and returns the callable that dispatches to its best implementation.

    An op registered this way has no backward: inputs that require grad are refused by name.
    """
    _library.define(name + schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"scrimp::{name}", fake, lib=_library)
    call = getattr(torch.ops.scrimp, name).default

    def requires_grad(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return any(map(requires_grad, value))
        return isinstance(value, torch.Tensor) and value.requires_grad

    def refuse_gradients(*args: Any) -> Any:
        if torch.is_grad_enabled() and requires_grad(args):
            raise RuntimeError(
                f"scrimp::{name} has no backward, but an input requires grad; "
                "call it under torch.no_grad() or detach its inputs"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return call(*args)

    _library.impl(name, refuse_gradients, "Autograd")
    if triton := _find_triton(name):
        compiled = _has_kernel(name, "CUDA")
        if not compiled or _wanted_cuda() == "triton":
            _library.impl(name, triton, "CUDA", allow_override=compiled)
            _triton_bound.add(name)
    OPS[name] = Op(name, call, reference)
    return call


def _find(name: str) -> Op:
    if name not in OPS:
        raise ValueError(f"there is no op {name!r}; ops are {', '.join(sorted(OPS))}")
    return OPS[name]


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"scrimp::{name}", key)


def which(name: str) -> dict[str, str]:
    """What runs for op `name` on each device, and why.

    >>> import scrimp
    >>> sorted(scrimp.which("merge_attention"))
    ['cpu', 'cuda']
    """
    _find(name)
    if _has_kernel(name, "CPU"):
        cpu = f"C++ ({_ext.current_isa()})"
    else:
        cpu = "reference (plain torch): " + (_ext.ops_missing or "no C++ kernel exists")
    if name in _triton_bound:
        cuda = "Triton"
    else:
        cuda = "CUDA C++" if _has_kernel(name, "CUDA") else "reference (plain torch): no kernel exists"
    if not torch.cuda.is_available():
        cuda += "; no CUDA device here"
    return {"cpu": cpu, "cuda": cuda}


def implementations(name: str) -> dict[str, Callable[..., Any]]:
    """Every implementation of op `name` that runs on this machine beside the reference.

    The callables take the op's flat arguments. C++ kernels appear once per instruction set ("cpu-avx2").

    >>> import scrimp
    >>> "reference" in scrimp.implementations("merge_attention")
    False
    """
    op = _find(name)

    def on_isa(isa: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with _ext.use_isa(isa):
                return op.call(*args)

        return run

    found: dict[str, Callable[..., Any]] = {}
    if _has_kernel(name, "CPU"):
        found |= {f"cpu-{isa}": on_isa(isa) for isa in _ext.available_isas()}
    if torch.cuda.is_available() and _has_kernel(name, "CUDA"):
        found["cuda"] = op.call
    return found
