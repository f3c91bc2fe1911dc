"""codebook_topk: a matrix product whose scores are never stored; bound by the product, for few rows by the codebook."""

from functools import partial
from itertools import cycle

import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS
from scrimp.testing import oracle_tolerance

from .registry import Call, Case, Problem, Work

CODES, BEST = 10_000, 8
COLD_BYTES = 2**28  # every call, ours or a peer's, takes the next copy of the codebook
CHECKED = 128  # rows beside the reference
# name: rows, D, dtype
SIZES = {
    "text-d64": (4096, 64, torch.float32),
    "text-d576": (4096, 576, torch.float32),
    "token-d64": (1, 64, torch.float32),
    "token-d576": (1, 576, torch.float32),
    "text-d64-bf16": (4096, 64, torch.bfloat16),
    "text-d576-bf16": (4096, 576, torch.bfloat16),
}


def cases() -> list[Case]:
    """Many rows and one, of a head's width and of SmolLM2-135M's."""
    found = []
    for name, (rows, d, dtype) in SIZES.items():
        fields = {"m": rows, "d": d, "codes": CODES, "k": BEST}
        make = partial(problem, rows, d, CODES, BEST, dtype)
        found.append(Case("codebook_topk", name.removesuffix("-bf16"), dtype, fields, ("torch",), make))
    return found


def problem(rows: int, d: int, codes: int, k: int, dtype: torch.dtype) -> Problem:
    """Inputs, call, check and limit."""
    x, codebook = torch.randn(rows, d).to(dtype), (torch.randn(codes, d) / d**0.5).to(dtype)
    turns = cycle([codebook.clone() for _ in range(COLD_BYTES // codebook.nbytes + 1 if rows < CHECKED else 1)])
    return Problem(
        inputs=(x, turns, k),
        ours=lambda: scrimp.ops.codebook_topk(x, next(turns), k),
        check=lambda got: check(got, x, codebook, k),
        work=Work(bytes=(2 * rows + codes) * d * dtype.itemsize + 8 * rows * k, flops=2 * rows * codes * d),
    )


def check(got: tuple[Tensor, Tensor, Tensor], x: Tensor, codebook: Tensor, k: int) -> None:
    """The scores of some rows are the k largest, those of the codes that are named, and `out` is these codes' mean."""
    out, index, scores = (part[:CHECKED] for part in got)
    args = (x[:CHECKED], codebook, None, k, False, True)
    largest = OPS["codebook_topk"].reference(*(a.double() if isinstance(a, Tensor) else a for a in args))[2]
    bound = oracle_tolerance(largest, OPS["codebook_topk"].reference(*args)[2])
    own = (x[:CHECKED, None].double() * codebook.double()[index.long()]).sum(-1)
    for what, exact in (("largest", largest), ("of its code", own)):
        worst = float((scores.double() - exact).abs().max())
        if not worst <= bound:
            raise AssertionError(f"a score is {worst:.2g} from the {what}, above the bound {bound:.2g}")
    chosen = codebook[index.long()]
    exact = chosen.double().mean(1)
    bound = oracle_tolerance(exact, chosen.mean(1))
    if not (worst := float((out.double() - exact).abs().max())) <= bound:
        raise AssertionError(f"out is {worst:.2g} from the mean of the codes, above the bound {bound:.2g}")


def tiny() -> Call:
    """A call that is all overhead."""
    x, codebook = torch.randn(1, 8), torch.randn(4, 8)
    return lambda: scrimp.ops.codebook_topk(x, codebook, 2)
