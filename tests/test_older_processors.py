"""A binary built here runs on processors with fewer instruction sets: the ops under emulated older ones."""

import os
import shutil
import subprocess
import sys

import pytest

QEMU = shutil.which("qemu-x86_64")
CODE = """
import torch, scrimp, scrimp.testing
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle
torch.set_num_threads(1)
(isa,) = {run.split("(")[1] for run in (scrimp.which(op)["cpu"] for op in OPS) if run.startswith("C++")}
q, k = torch.randn(1, 2, 70, 24), torch.randn(1, 1, 70, 24)
plan = scrimp.SparsePlan.vertical_slash(70, columns=[[3, 20]], diagonals=[[0, 40]])
starts = torch.arange(70, dtype=torch.int32)[None] // 2
tensors = (plan.ranges, plan.range_slice, plan.columns, plan.column_slice, starts)
args = (q, k, k, *tensors, plan.q_block, 0, True, 0.2)
state = OPS["sparse_attention"].call(*args)
assert_matches_oracle(state, OPS["sparse_attention"].reference, *args)
assert_matches_oracle(OPS["merge_attention"].call(*state, *state), OPS["merge_attention"].reference, *state, *state)
layers = (torch.randn(9, 70), [torch.randn(33, 70), torch.randn(3, 70)], [None, torch.randn(3)], None)
assert_matches_oracle(OPS["linear"].call(*layers), OPS["linear"].reference, *layers)
weight = scrimp.testing.random_int4_weight(33, 96, kind="uint8")
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for mode in (0, 1):
        args = (torch.randn(3, 96).to(dtype), *weight.tensors().values(), None, 32, 1, mode)
        assert_matches_oracle(OPS["int4_linear"].call(*args), OPS["int4_linear"].reference, *args)
x, weight, start = torch.randn(5, 70), torch.randn(70), torch.tensor([600], dtype=torch.int32)
heads, table = torch.randn(1, 3, 2, 24), torch.rand(9, 16)
caches = torch.zeros(1, 2, 700, 24), torch.ones(1, 2, 700, 24)
for op, args in {
    "rms_norm": (x, weight, 1e-5),
    "silu_mul": (x, x),
    "gelu_mul": (x, x, False),
    "rotary_append": (heads, heads, heads, table, table, start[:, None] * 0 + torch.arange(3).int(), start, *caches),
    "tree_attention": (heads.transpose(1, 2), *caches, start, torch.tensor([[1, 3, 5]]), 0, 0.2),
}.items():
    for dtype in (torch.float32, torch.bfloat16):
        same = [a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() and a is not table else a for a in args]
        assert_matches_oracle(OPS[op].call(*same), OPS[op].reference, *same)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    chosen = scrimp.ops.channel_select(torch.randn(5, 70).to(dtype), 0.7)
    args = (chosen[0], torch.randn(70, 33).to(dtype), *chosen[1:3], None, None)
    assert_matches_oracle(OPS["sparse_linear"].call(*args), OPS["sparse_linear"].reference, *args)
head = (torch.randn(3, 70), torch.randn(20, 70), torch.randint(20, (2, 133), dtype=torch.int32), torch.randn(133))
for dtype in (torch.float32, torch.bfloat16):
    args = [a.to(dtype) if a.is_floating_point() else a for a in head]
    assert_matches_oracle(OPS["vq_logits"].call(*args), OPS["vq_logits"].reference, *args)
numbers = (torch.tensor([0.0, 5.0, 9.0]), torch.arange(3), torch.arange(3), 90, 0.9, 0.01)
args = (*(a.round() for a in head), *numbers)  # of integers, whose sums are exact
assert torch.equal(OPS["vq_sample"].call(*args), OPS["vq_sample"].reference(*args))
whole = (torch.randint(-3, 4, (5, 40)), torch.randint(-3, 4, (2, 77, 20)))
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    args = (*(a.to(dtype) for a in whole), torch.randint(9, (2, 77)).float(), 5, True, True)
    for got, expected in zip(OPS["codebook_topk"].call(*args), OPS["codebook_topk"].reference(*args), strict=True):
        assert torch.equal(got, expected)
found = scrimp.ops.vertical_slash_index(q, k, torch.tensor([8, 0]).int(), torch.tensor([5, 9]).int())
found.validate()
print("ran on", isa.rstrip(")"))
"""


@pytest.mark.subprocess
@pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64 (apt-get install qemu-user)")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="emulates x86-64 processors")
@pytest.mark.parametrize(("processor", "isa"), [("Westmere", "portable"), ("Haswell", "avx2")])
def test_ops_run(processor: str, isa: str) -> None:
    command = [str(QEMU), "-cpu", processor, sys.executable, "-c", CODE]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == f"ran on {isa}"
