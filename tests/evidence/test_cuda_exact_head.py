"""exact_head in CUDA C++: the formula of its cost, and the calls it takes. Its bits: `test_exact_head_bits.py`."""

import pytest
import torch
from cuda_device import call
from cuda_subjects.exact_head import CASES, MANY
from scrimp.benchmarks.exact_head_cost import reranked, screened
from subjects.exact_head import make

from scrimp.ops.exact_head import _cuda_takes


@pytest.mark.parametrize("name", [name for name in CASES if name != MANY])
def test_formula(name: str) -> None:
    """The screen exactly; of the exact products those with the rows that the lists turned out to hold."""
    torch.manual_seed(0)
    args = CASES[name]()
    M, size = len(args[0]), args[0].element_size()
    asked, flops, stored = {}, {}, []
    for run in call("exact_head", *args)[1]:
        kind = run.kernel.split("_")[2]
        asked[kind] = asked.get(kind, 0) + run.counters.loaded_and_stored
        flops[kind] = flops.get(kind, 0) + run.counters.tensor_flops
        if kind == "rerank":
            stored += [sum(row.values["useful"] for row in run.counters.rows if "st.global" in row.text)]
    lists = [one // (M * size) for one in stored]
    screen = screened(*args)
    assert flops["screen"] == screen.flops_issued >= screen.flops_useful
    assert sum(asked[kind] for kind in ("state", "screen", "select", "list")) == screen.bytes + 12 * sum(lists)
    products = [reranked(args[0], M, listed, 0) for listed in lists]
    assert flops["rerank"] == sum(one.flops_issued for one in products)
    lengths = 16 * 2 * -(-len(args[1]) // 64)  # of a list, in each warp of a block
    assert asked["rerank"] == sum(one.bytes for one in products) - 12 * sum(lists) + lengths


def test_what_it_takes() -> None:
    """16-bit heads whose vectors of 16 bytes are whole."""
    x, weight, *rest = make(3, 64, 70, 2, torch.float16)
    assert _cuda_takes(x, weight, *rest)
    assert _cuda_takes(x[:0], weight, *rest)
    assert not _cuda_takes(x.float(), weight.float(), *rest)
    assert not _cuda_takes(x[:, :60], weight[:, :60], *rest)
    assert not _cuda_takes(x, torch.cat([weight, weight], 1)[:, 4:68], *rest)
    assert not _cuda_takes(x, torch.cat([weight, weight[:, :4]], 1)[:, :64], *rest)
    assert not _cuda_takes(x[:, :0], weight[:, :0], *rest)
