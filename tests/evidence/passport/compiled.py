"""Compiles what is shipped: every Triton launch of an op's configurations."""

import ast
import hashlib
import importlib
import re
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import ptx
from emulate import request
from subjects import SUBJECTS

ROOT = Path(__file__).resolve().parents[3]
ARCHES: tuple[int | str, ...] = (80, 90, 100, "gfx942")
DEFAULT_ARCHES: tuple[int | str, ...] = (80, 90)


@dataclass(frozen=True)
class Shipped:
    """One kernel of one configuration on one architecture ("sm_80", "gfx942")."""

    op: str
    config: str
    kernel: str
    arch: str
    constants: Mapping[str, Any]
    asked: ptx.TritonRequest


def arch_name(arch: int | str) -> str:
    return f"sm_{arch}" if isinstance(arch, int) else arch


def tuned_for(arch: str) -> Any:
    """A context in which kernels choose the configuration of an architecture, as they would on a device of it."""
    return mock.patch("scrimp.kernels.tuning.device_names", return_value=(arch, "default"))


def shipped(op: str, configs: Iterable[str], arches: Iterable[int | str]) -> list[Shipped]:
    """Every kernel of the named configurations, once each."""
    found: dict[tuple[str, str, str], Shipped] = {}
    for arch in arches:
        for config in configs:
            with tuned_for(arch_name(arch)):
                _, launches = importlib.import_module(f"scrimp.kernels.{op}").launches(*SUBJECTS[op].shipped[config]())
            for launch in launches:
                asked = request(launch, arch)
                one = Shipped(op, config, asked.name, arch_name(arch), launch.constants, asked)
                found.setdefault((config, flags(asked), one.arch), one)
    return list(found.values())


def flags(asked: ptx.TritonRequest) -> str:
    """A hash of everything but the source: types, constants, divisibility, warps, stages, architecture."""
    return digest(replace(asked, path="").as_json())


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sources(op: str) -> dict[str, str]:
    """A hash of every file of the op's kernels, whatever their comments and layout, and of jitted code they import."""
    found = {f"kernels/{op}.py": _jitted(ROOT / "kernels" / f"{op}.py")}
    for name in re.findall(r"^from \.(\w+) import", (ROOT / "kernels" / f"{op}.py").read_text(), re.M):
        if "@triton.jit" in (path := ROOT / "kernels" / f"{name}.py").read_text():
            found[f"kernels/{name}.py"] = _jitted(path)
    return found


def _jitted(path: Path) -> str:
    """Of the tokens of a file's jitted functions."""
    text = path.read_text()
    lines, words = text.splitlines(keepends=True), []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(word) for word in node.decorator_list):
            part = iter(lines[node.decorator_list[0].lineno - 1 : node.end_lineno])
            tokens = tokenize.generate_tokens(lambda part=part: next(part, ""))  # type: ignore[misc]
            words += [token.string for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    return digest("\n".join(words))


def compile_shipped(some: Sequence[Shipped], triton: Path | None = None) -> list[ptx.Compiled]:
    return ptx.compile_triton_all([one.asked for one in some], triton)
