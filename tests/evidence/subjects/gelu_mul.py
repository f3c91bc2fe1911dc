"""Evidence of gelu_mul."""

import torch
from scrimp.kernels import gelu_mul as kernels

from . import gate
from .subject import Subject, against_oracle

EXTRAS = [(True,), (False,)]
EMULATED = gate.cases([torch.float16, torch.bfloat16], EXTRAS)
SUBJECT = Subject(
    op="gelu_mul",
    cases=EMULATED,
    warp_cases=list(EMULATED)[:4],
    interpreted=gate.cases([torch.float16, torch.float32], EXTRAS),
    check=against_oracle("gelu_mul"),
    reference_launch=next(name for name in EMULATED if "1200" in name and "halves" in name),
    shipped=gate.shipped(EXTRAS),
    defaults=["14336-bfloat16-True", "14336-bfloat16-False"],
    mutants=gate.mutants("gelu_mul", kernels.gelu_mul_kernel),
    mutant_case="21-601-float16-halves-True-True",
)
