"""Evidence of silu_mul."""

import torch
from scrimp.kernels import silu_mul as kernels

from . import gate
from .subject import Subject, against_oracle

EMULATED = gate.cases([torch.float16, torch.bfloat16], [()])
SUBJECT = Subject(
    op="silu_mul",
    cases=EMULATED,
    warp_cases=list(EMULATED)[:4],
    interpreted=gate.cases([torch.float16, torch.float32], [()]),
    check=against_oracle("silu_mul"),
    reference_launch=next(name for name in EMULATED if "1200" in name and "halves" in name),
    shipped=gate.shipped([()]),
    defaults=["14336-bfloat16"],
    mutants=gate.mutants("silu_mul", kernels.silu_mul_kernel),
    mutant_case="21-601-float16-halves-True",
)
