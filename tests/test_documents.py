"""What the documents show works: every doctest of the package and the README's first Python example."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import scrimp

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    found.name
    for found in pkgutil.walk_packages(scrimp.__path__, "scrimp.")
    if not re.match(r"scrimp\.(_C|_host|benchmarks|kernels)", found.name)
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"SparsePlan": scrimp.SparsePlan, "torch": torch}).failed == 0


@pytest.mark.parametrize("op", scrimp.ops.__all__)
def test_every_op_has_an_example(op: str) -> None:
    example = getattr(scrimp.ops, op).__doc__
    assert ">>>" in example
    for word in ("Args:", "Returns:", "Raises:", "Source:"):
        assert word in example, f"{op} lacks {word}"


def test_readme_example() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code
    names: dict = {}
    exec(code[1], names)
    assert round(names["plan"].density(), 1) == 0.1
    assert names["out"].shape == (1, 9, 8192, 64)


def test_readme_speaks_only_of_files_that_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
