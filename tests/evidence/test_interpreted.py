"""Every op's Triton kernels against the oracle, in fp16 and fp32: by the interpreter, or on a GPU if there is one."""

import importlib
from typing import Any

import pytest
import torch
from subjects import SUBJECTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, s in SUBJECTS.items() for name in s.interpreted])
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_against_the_oracle(op: str, name: str) -> None:
    subject = SUBJECTS[op]
    args = tuple(to_device(arg) for arg in subject.interpreted[name]())
    results, launches = importlib.import_module(f"scrimp.kernels.{op}").launches(*args)
    for launch in launches:
        launch.run()
    subject.check(results, args)


def to_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value
