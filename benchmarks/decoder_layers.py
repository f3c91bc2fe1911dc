"""decoder_layers: a decoding step through all layers in one call, beside the same ops one by one (`self-ops`)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scrimp import Int4Weight
from scrimp._registry import OPS
from scrimp.methods.generation.forward import through
from scrimp.methods.generation.linear import fuse
from scrimp.methods.generation.model import DecoderLayer, DecoderModel, Norm, Positions
from scrimp.methods.int4 import Int4Linear
from scrimp.methods.wina import Int4SparseLinear, Selection, SparseLinear

from .registry import Call, Case, Problem, Work

LAYERS, WIDTH, HIDDEN, H, G, D = 30, 576, 1536, 9, 3, 64  # SmolLM2-135M
SLOTS, CACHED, GROUP_SIZE = 256, 128, 64
SPARSITY, LEVEL = 0.5, 0.845  # half of a normal row's absolute values are above so many of their means
KINDS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int4": torch.float32,
    "sparse": torch.float32,
    "sparse-int4": torch.float32,
}


def cases() -> list[Case]:
    """One new token, and a tree of 16; dense and 4-bit weights; one token that takes half of the channels."""
    return [case(kind, rows) for kind in KINDS for rows in (1, 16) if rows == 1 or "sparse" not in kind]


def case(kind: str, rows: int) -> Case:
    """One sequence of CACHED tokens."""
    fields: dict[str, Any] = {"m": rows, "batch": 1, "layers": LAYERS, "heads": H, "kv_heads": G, "head_dim": D}
    if "sparse" in kind:
        fields["sparsity"] = SPARSITY
    name = f"smollm2-{rows}" if kind in ("fp32", "bf16") else f"smollm2-{kind}-{rows}"
    return Case("decoder_layers", name, KINDS[kind], fields, ("self-ops",), partial(problem, kind, rows))


def linears(kind: str, sizes: list[tuple[int, int]]) -> Any:
    """Layers of one input, of random weights."""
    (K,) = {K for _, K in sizes}
    selection, modules = Selection(torch.tensor([LEVEL]), 0.5 + torch.rand(K)), list[torch.nn.Module]()
    joined = torch.randn(K, sum(N for N, _ in sizes) if kind == "sparse" else 0) / K**0.5
    for N, _ in sizes:
        if kind == "sparse":
            part, joined = joined.tensor_split([N], 1)
            modules.append(SparseLinear(part, None, selection))
        elif "int4" in kind:
            scales = torch.rand(N, K // GROUP_SIZE) / (4 * K**0.5)
            weight = Int4Weight.from_codes(torch.randint(16, (N, K)), scales)
            sparse = kind == "sparse-int4"
            modules.append(
                Int4SparseLinear(weight, None, selection, "int8") if sparse else Int4Linear(weight, mode="int8")
            )
        else:
            modules.append(torch.nn.Linear(K, N, bias=False, dtype=KINDS[kind]))
    return fuse([module.requires_grad_(False) for module in modules])


def problem(kind: str, rows: int) -> Problem:
    """Random layers, calls, check and limit."""
    norm = Norm(torch.ones(WIDTH, dtype=KINDS[kind]), 1e-5)
    layer = partial(DecoderLayer, attention_norm=norm, q_norm=None, k_norm=None, mlp_norm=norm, window=0)
    layers = tuple(
        layer(
            qkv=linears(kind, [(H * D, WIDTH), (G * D, WIDTH), (G * D, WIDTH)]),
            o=linears(kind, [(WIDTH, H * D)]),
            gate_up=linears(kind, [(HIDDEN, WIDTH), (HIDDEN, WIDTH)]),
            down=linears(kind, [(WIDTH, HIDDEN)]),
        )
        for _ in range(LAYERS)
    )
    model = DecoderModel(
        name="smollm2",
        embedding=torch.zeros(1, WIDTH, dtype=KINDS[kind]),
        layers=layers,
        norm=norm,
        head=layers[0].o,
        activation="silu",
        positions=Positions(
            lambda at: (torch.cos(at[:, None] * torch.ones(D)), torch.sin(at[:, None] * torch.ones(D)))
        ),
        heads=H,
        kv_heads=G,
        head_dim=D,
        scale=D**-0.5,
        context=SLOTS,
        eos=(),
        weights=(),
    )
    models = {packing: replace(model, packing=packing) for packing in (True, False)}
    keys, values = ([torch.randn(1, G, SLOTS, D).to(KINDS[kind]) for _ in range(LAYERS)] for _ in range(2))
    x = torch.randn(1, rows, WIDTH).to(KINDS[kind])
    start = torch.tensor([CACHED], dtype=torch.int32)

    def call(packing: bool) -> Tensor:
        return through(models[packing], keys, values, x, start, range(LAYERS))

    weights = [linear for one in layers for linear in (one.qkv, one.o, one.gate_up, one.down)]
    tensors = [tensor for linear in weights for part, _ in linear.pack().parts for tensor in part if tensor is not None]
    read = 1 - SPARSITY if "sparse" in kind else 1  # nearly: scales of 4-bit weights are read for all channels
    numbers = LAYERS * (WIDTH * (H + 2 * G) * D + WIDTH * H * D + 3 * WIDTH * HIDDEN)
    cached = 2 * LAYERS * G * D * (CACHED + rows) * x.element_size()
    return Problem(
        inputs=(x,),
        ours=lambda: call(packing=True),
        check=lambda got: check(got, call(packing=False)),
        work=Work(bytes=read * sum(tensor.nbytes for tensor in tensors) + cached, flops=2.0 * rows * read * numbers),
        own={"self-ops": lambda: call(packing=False)},
    )


def check(got: Tensor, expected: Tensor) -> None:
    """To the bit."""
    if not torch.equal(got, expected):
        raise AssertionError("one call computes something else than the ops one by one")


def tiny() -> Call:
    """A call that is all overhead."""
    one, w, zero = torch.ones(8), torch.eye(8), torch.zeros(1, dtype=torch.int32)
    cache, table = torch.zeros(2, 1, 1, 2, 8), torch.ones(2, 8)
    norms, linear = [one, None, None, one], [w, *[None] * 5] * 7
    sees = (table, table, zero[None], zero, zero, None, [cache[0]], [cache[1]], [0], 1, 0, 1.0)
    call, x = OPS["decoder_layers"].call, torch.ones(1, 1, 8)
    return lambda: call(x, norms, [1e-5] * 4, linear, [0] * 21, [], *sees)
