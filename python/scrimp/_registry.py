"""Registration of ops with the dispatcher, and the answer to "which code runs?".

`register` defines the schema in Python; C++ and CUDA implementations registered themselves when `_ext` loaded the
library, and a Triton kernel is bound to the CUDA key where no CUDA C++ exists, so the reference is what the dispatcher
falls back to where no kernel exists. `SCRIMP_CUDA_IMPL=triton` asks for Triton where both exist; an op whose CUDA C++
does not take all inputs says which it takes, and Triton serves the others.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from . import _ext

_library = torch.library.Library("scrimp", "FRAGMENT")


@dataclass(frozen=True)
class Op:
    """One registered op: its dispatcher handle, its plain-torch reference, its GPU kernels, first the one that runs.

    `run` is `call` without the detour through Python that refuses gradients, where none are asked for.
    """

    name: str
    call: Callable[..., Any]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    cuda: Mapping[str, Callable[..., Any]]


OPS: dict[str, Op] = {}
_CUDA_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_CUDA_WORDS = {"cuda-c++": "CUDA C++", "cuda-triton": "Triton"}


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


def register(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    cuda_takes: Callable[..., bool] | None = None,
) -> Callable[..., Any]:
    """Defines `scrimp::<name>` and returns the callable that dispatches to its best implementation.

    `cuda_takes` says of flat arguments whether the kernels in CUDA C++ take them; None where they take all. An op
    registered this way has no backward: inputs that require grad are refused by name.
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

    def run(*args: Any) -> Any:
        """Past the refusal where nothing records gradients: being asked takes longer than a small kernel."""
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return call(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return call(*args)

    _library.impl(name, refuse_gradients, "Autograd")
    OPS[name] = Op(name, call, run, reference, _bind_cuda(name, cuda_takes))
    return run


def _bind_cuda(name: str, takes: Callable[..., bool] | None) -> dict[str, Callable[..., Any]]:
    """Binds to the CUDA key what is not bound yet; the kernels by name, first the one that runs."""
    wish, found = _wanted_cuda(), dict[str, Callable[..., Any]]()
    if _has_kernel(name, "CUDA"):
        found["cuda-c++"] = functools.partial(
            torch.library.get_kernel(f"scrimp::{name}", "CUDA").call_boxed, _CUDA_KEYS
        )
    if triton := _find_triton(name):
        if not found or wish == "triton":
            _bind(name, triton, bool(found))
            found = {"cuda-triton": triton} | found
        else:
            if takes is not None:
                found["cuda-c++"] = _either(takes, found["cuda-c++"], triton)
                _bind(name, found["cuda-c++"], True)
            found["cuda-triton"] = triton
    return found


def _bind(name: str, kernel: Callable[..., Any], instead: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        _library.impl(name, kernel, "CUDA", allow_override=instead)


def _either(takes: Callable[..., bool], compiled: Callable[..., Any], triton: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: (compiled if takes(*args) else triton)(*args)


def _find(name: str) -> Op:
    if name not in OPS:
        raise ValueError(f"there is no op {name!r}; ops are {', '.join(sorted(OPS))}")
    return OPS[name]


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"scrimp::{name}", key)


def has_kernel(name: str, device: torch.device) -> bool:
    """Whether more than the plain-torch reference of an op runs on a device."""
    return _has_kernel(name, device.type.upper())


def which(name: str) -> dict[str, str]:
    """What runs for op `name` on each device, and why.

    >>> import scrimp
    >>> sorted(scrimp.which("merge_attention"))
    ['cpu', 'cuda']
    """
    op = _find(name)
    if _has_kernel(name, "CPU"):
        cpu = f"C++ ({_ext.current_isa(name)})"
    else:
        cpu = "reference (plain torch): " + (_ext.ops_missing or "no C++ kernel exists")
    cuda = _CUDA_WORDS[next(iter(op.cuda))] if op.cuda else "reference (plain torch): no kernel exists"
    if not torch.cuda.is_available():
        cuda += "; no CUDA device here"
    return {"cpu": cpu, "cuda": cuda}


def implementations(name: str) -> dict[str, Callable[..., Any]]:
    """Every implementation of op `name` that runs on this machine beside the reference.

    The callables take the op's flat arguments. C++ kernels appear once per instruction set ("cpu-avx2"), those of a GPU
    as "cuda-c++" and "cuda-triton"; the latter move their arguments to the GPU, and back what
    they return and write.

    >>> import scrimp
    >>> "reference" in scrimp.implementations("merge_attention")
    False
    """
    op = _find(name)
    schema = getattr(torch.ops.scrimp, name).default._schema

    def on_isa(isa: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with _ext.use_isa(isa):
                return op.call(*args)

        return run

    def on_gpu(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            moved = tree_map_only(torch.Tensor, torch.Tensor.cuda, args)
            results = tree_map_only(torch.Tensor, torch.Tensor.cpu, kernel(*moved))
            for argument, mine, theirs in zip(schema.arguments, args, moved, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    mine.copy_(theirs)
            return results

        return run

    found: dict[str, Callable[..., Any]] = {}
    if _has_kernel(name, "CPU"):
        found |= {f"cpu-{isa}": on_isa(isa) for isa in _ext.available_isas(name)}
    if torch.cuda.is_available():
        found |= {kind: on_gpu(kernel) for kind, kernel in op.cuda.items()}
    return found
