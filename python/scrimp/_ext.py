"""The compiled modules: loads them, keeps the reason where one is missing, and chooses the instruction set.

`SCRIMP_ISA=portable|avx2|avx512|avx512vnni` asks for a path of the CPU kernels; one that cannot be had is an error.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

ISAS = ("portable", "avx2", "avx512", "avx512vnni")
# with a copy of their kernels for the last one (csrc/cpu/*.vnni.kernel.cpp)
VNNI_OPS = ("exact_head", "int4_linear", "int4_sparse_linear")

_library = torch.library.Library("scrimp", "FRAGMENT")
_library.define("_set_isa(int isa) -> int")


def _load(name: str) -> tuple[ModuleType | None, str]:
    if importlib.util.find_spec(f"scrimp.{name}") is None:
        return (
            None,
            f"scrimp.{name} was not built (reinstall with a C++ compiler and without SCRIMP_NO_EXT=1)",
        )
    try:
        return importlib.import_module(f"scrimp.{name}"), ""
    except ImportError as error:
        return None, f"scrimp.{name} does not load: {error}"


_ops_module, ops_missing = _load("_C")
host, host_missing = _load("_host")


def available_isas(op: str | None = None) -> tuple[str, ...]:
    """Instruction sets whose kernels (of one op) run here, narrowest first; empty without the compiled ops."""
    if _ops_module is None or host is None:
        return ()
    built = ISAS if op is None or op in VNNI_OPS else ISAS[:-1]
    return tuple(isa for isa in built if ISAS.index(isa) <= ISAS.index(host.detect_isa()))


def current_isa(op: str | None = None) -> str | None:
    """Instruction set in use (by one op), or None without the compiled ops."""
    if _ops_module is None:
        return None
    previous = torch.ops.scrimp._set_isa(0)
    torch.ops.scrimp._set_isa(previous)
    return ISAS[previous] if ISAS[previous] in available_isas(op) else available_isas(op)[-1]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the kernels of one instruction set inside a `with` block (the whole process, not one thread)."""
    if name not in available_isas():
        reason = ops_missing or host_missing or f"this processor runs {', '.join(available_isas())}"
        raise RuntimeError(f"instruction set {name!r} is not available: {reason}")
    previous = torch.ops.scrimp._set_isa(ISAS.index(name))
    try:
        yield
    finally:
        torch.ops.scrimp._set_isa(previous)


def _apply_environment() -> None:
    wish = os.environ.get("SCRIMP_ISA")
    if wish is None:
        return
    if wish not in available_isas():
        reason = ops_missing or host_missing or f"available are {', '.join(available_isas())}"
        raise RuntimeError(f"SCRIMP_ISA={wish} cannot be met: {reason}")
    torch.ops.scrimp._set_isa(ISAS.index(wish))


_apply_environment()
