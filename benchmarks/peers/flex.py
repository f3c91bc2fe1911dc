"""torch's flex_attention, compiled for the plan's block mask."""

import shutil

import torch
from torch import Tensor

from scrimp import SparsePlan

from ..registry import Peer

DISTRIBUTION = "torch"
BLOCK = 128  # flex's own default


def available() -> str | None:
    """torch.compile needs a C++ compiler."""
    from torch._inductor import config

    compilers = [name for name in config.cpp.cxx if name]
    if any(shutil.which(name) for name in compilers):
        return None
    return f"torch.compile finds no C++ compiler ({', '.join(compilers)}); apt-get install g++"


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan) -> Peer:
    """The same mask in blocks of the plan's tile height by 128 keys; ValueError where the plan is not in blocks."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = plan.to_flex_block_mask(BLOCK)
    torch._dynamo.reset()  # else the ninth shape or thread count would run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    grouped = q.shape[1] != k.shape[1]
    return Peer(lambda: compiled(q, k, v, block_mask=mask, enable_gqa=grouped))
