"""decoder_layers against the ops it is made of, its reference and its contract."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp import Int4Weight
from scrimp._registry import OPS
from scrimp.int4_weight import Int4Channels
from scrimp.int4_weight.check import ZERO_KINDS
from scrimp.ops._int4 import MODES
from scrimp.testing import assert_matches_oracle, same_bits

OP = OPS["decoder_layers"]
IMPLEMENTATIONS = scrimp.implementations("decoder_layers")
ALL = IMPLEMENTATIONS | {"reference": OP.reference}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = ("x", "k_caches", "v_caches")
LISTS = ("norms", "linears", "selections", "k_caches", "v_caches")
ORDER = OP.call._schema.arguments
H, G, D, WIDTH, HIDDEN, SLOTS = 4, 2, 8, 32, 48, 20
# outputs and inputs of q, k, v, o, gate, up, down
SIZES = [
    (H * D, WIDTH),
    (G * D, WIDTH),
    (G * D, WIDTH),
    (WIDTH, H * D),
    (HIDDEN, WIDTH),
    (HIDDEN, WIDTH),
    (WIDTH, HIDDEN),
]
GROUPS = ((0, 3), (3, 4), (4, 6), (6, 7))
DENSE, SPARSE = ("dense", "biased", "exact", "int8"), ("sparse", "sparse-whole", "sparse-exact", "sparse-int8")
KINDS = (*DENSE, *SPARSE)


def linear_layer(kind: str, N: int, K: int, dtype: torch.dtype) -> tuple[list[Tensor | None], list[int]]:
    """The op's six tensors and three numbers."""
    bias = torch.randn(N).to(dtype) if kind != "dense" else None
    if kind in ("dense", "biased"):
        return [(torch.randn(N, K) / K**0.5).to(dtype), bias, None, None, None, None], [0, 0, 0]
    if kind in ("sparse", "sparse-whole"):
        return [(torch.randn(K, N) / K**0.5).to(dtype), bias, None, None, None, None], [0, 0, 0]
    codes, scales = torch.randint(16, (N, K)), torch.rand(N, K // 16) / (4 * K**0.5)
    zeros = torch.randint(16, scales.shape, dtype=torch.uint8)
    order = torch.randperm(K, dtype=torch.int32) if N == G * D else None  # of k and v alone
    weight = Int4Weight.from_codes(codes, scales, zeros, zero_kind="uint8", permutation=order)
    turned = Int4Channels.of(weight) if kind in SPARSE else weight
    codes, *rest = turned.tensors().values()
    return [codes, bias, *rest], [16, ZERO_KINDS.index("uint8"), int(kind.endswith("int8"))]


def group(kind: str, sizes: list[tuple[int, int]], dtype: torch.dtype) -> tuple[list, list, list]:
    """What the op takes of layers of one input: tensors, numbers, selection. Sparse q, k and v lie in one matrix."""
    K, joined = sizes[0][1], kind in ("sparse", "sparse-whole") and len(sizes) == 3
    made = [linear_layer(kind, N, K, dtype) for N in ([sum(N for N, _ in sizes)] if joined else [N for N, _ in sizes])]
    made += [([None] * 6, [0, 0, 0])] * (len(sizes) - len(made))
    selection: list[Tensor | None] = [None] * 3
    if kind == "sparse-whole":
        selection[0] = torch.tensor([-1.0])
    elif kind in SPARSE:
        selection = [torch.tensor([0.8]), torch.rand(K) + 0.5, torch.randn(K) / 4 if len(sizes) < 3 else None]
    return [tensor for tensors, _ in made for tensor in tensors], [n for _, numbers in made for n in numbers], selection


def inputs(
    kinds: tuple[str, ...], B: int = 2, T: int = 3, dtype: torch.dtype = torch.float32, normed: bool = True
) -> dict[str, Any]:
    """Arguments of one layer for each of `kinds`; the last layer has a window."""
    layers, angle = len(kinds), 6 * torch.rand(SLOTS, D)
    groups = [group(kind, SIZES[first:end], dtype) for kind in kinds for first, end in GROUPS]
    norms: list[Tensor | None] = []
    for _ in kinds:
        norms += [torch.rand(n).to(dtype) + 0.5 if n != D or normed else None for n in (WIDTH, D, D, WIDTH)]
    start = torch.randint(1, 5, (B,), dtype=torch.int32)
    return {
        "x": torch.randn(B, T, WIDTH).to(dtype),
        "norms": norms,
        "eps": [1e-6] * 4 * layers,
        "linears": [tensor for tensors, _, _ in groups for tensor in tensors],
        "formats": [number for _, numbers, _ in groups for number in numbers],
        "selections": [t for _, _, selection in groups for t in selection] if {*SPARSE} & {*kinds} else [],
        "cos": angle.cos(),
        "sin": angle.sin(),
        "positions": start[:, None] + torch.arange(T, dtype=torch.int32),
        "start": start,
        "prefix": start,
        "ancestors": None,
        "k_caches": [torch.randn(B, G, SLOTS, D).to(dtype) for _ in kinds],
        "v_caches": [torch.randn(B, G, SLOTS, D).to(dtype) for _ in kinds],
        "windows": [0] * (layers - 1) + [3],
        "heads": H,
        "activation": 0,
        "scale": D**-0.5,
    }


def run(call: Callable[..., Tensor], args: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The state and copies of the caches that were written."""
    caches = {name: [cache.clone() for cache in args[name]] for name in ("k_caches", "v_caches")}
    x = call(*(args | caches).values())
    return x, torch.stack(caches["k_caches"]), torch.stack(caches["v_caches"])


def op_by_op(*values: Any) -> Tensor:
    """The same layers by the ops of scrimp, as the decoding loop would call them."""
    a = dict(zip((argument.name for argument in ORDER), values, strict=True))
    x, call = a["x"], {name: op.call for name, op in OPS.items()}
    for i, (k_cache, v_cache, window) in enumerate(zip(a["k_caches"], a["v_caches"], a["windows"], strict=True)):
        norms, eps = a["norms"][4 * i :], a["eps"][4 * i :]
        layers = [(a["linears"][6 * j :][:6], a["formats"][3 * j :][:3]) for j in range(7 * i, 7 * i + 7)]

        def norm(of: Tensor, which: int, norms: Any = norms, eps: Any = eps) -> Tensor:
            return of if norms[which] is None else call["rms_norm"](of, norms[which], eps[which])

        def product(of: Tensor, which: int, residual: Tensor | None = None, layers: Any = layers, i: int = i) -> Tensor:
            some, listed = layers[slice(*GROUPS[which])], []
            selection = a["selections"][12 * i + 3 * which :][:3]
            if selection and selection[0] is not None:
                of, *listed, _ = call["channel_select"](of, *selection, None, 1, False)
                some = [(t, numbers) for t, numbers in some if t[0] is not None]
            if some[0][1][0] == 0:
                if not listed:
                    return call["linear"](of, [t[0] for t, _ in some], [t[1] for t, _ in some], residual)
                return torch.cat([call["sparse_linear"](of, t[0], *listed, t[1], residual) for t, _ in some], -1)
            op = call["int4_sparse_linear" if listed else "int4_linear"]
            y = torch.cat([op(of, t[0], *t[2:], *listed, t[1], *numbers) for t, numbers in some], -1)
            return y if residual is None else y + residual

        q, k, v = product(norm(x, 0), 0).unflatten(-1, (-1, D)).split([H, G, G], 2)
        rope = (a["cos"], a["sin"], a["positions"], a["start"], k_cache, v_cache)
        q = call["rotary_append"](norm(q, 1), norm(k, 2), v, *rope)
        seen = call["tree_attention"](q, k_cache, v_cache, a["prefix"], a["ancestors"], window, a["scale"])[0]
        x = product(seen.transpose(1, 2).flatten(2), 1, x)
        gate, up = product(norm(x, 3), 2).chunk(2, -1)
        hidden = (
            call["silu_mul"](gate, up) if a["activation"] == 0 else call["gelu_mul"](gate, up, a["activation"] == 2)
        )
        x = product(hidden, 3, x)
    return x


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("decoder_layers")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_oracle(name: str, kind: str) -> None:
    # a rounded activation's next integer is another input
    args = inputs((kind,) if kind.endswith("int8") else (kind, kind))

    def reference(*floats: Tensor) -> tuple[Tensor, ...]:
        names = ("x", "cos", "sin")
        wide = floats[0].dtype
        some = dict(zip(names, floats, strict=True))
        lists = {key: [_wide(t, wide) for t in args[key]] for key in LISTS}
        return run(OP.reference, args | some | lists)

    got = run(IMPLEMENTATIONS[name], args)
    assert_matches_oracle(got, reference, args["x"], args["cos"], args["sin"], names=NAMES)


def _wide(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor


@pytest.mark.parametrize("isa", [name.removeprefix("cpu-") for name in IMPLEMENTATIONS if name.startswith("cpu")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_is_the_ops_one_by_one(isa: str, dtype: str, kind: str, threads: int) -> None:
    """Bitwise, the caches too; with a tree, with and without norms of the heads, and every activation."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with scrimp._ext.use_isa(isa):
            for activation, normed in ((0, True), (1, False), (2, False)):
                args = inputs((kind, kind), 2, 5, DTYPES[dtype], normed) | {"activation": activation}
                if activation:
                    args |= {"windows": [0, 0], "ancestors": torch.tensor([[1, 3, 5, 11, 21]])}
                for got, expected in zip(run(OP.call, args), run(op_by_op, args), strict=True):
                    assert same_bits(got, expected)
    finally:
        torch.set_num_threads(before)


def test_an_error_between_threads_that_wait_ends_them() -> None:
    """It is raised as it was made, and the threads are there for the next call."""
    before, args = torch.get_num_threads(), inputs(("dense", "dense"))
    expected = run(OP.call, args)
    torch.set_num_threads(3)
    try:
        for _ in range(20):
            with pytest.raises(RuntimeError, match="layer 0 gives 64 numbers for 3 and 2 heads of 8"):
                OP.call(*(args | {"heads": 3}).values())
            assert all(map(same_bits, run(OP.call, args), expected))
    finally:
        torch.set_num_threads(before)


def test_layers_of_one_input_may_differ_in_mode() -> None:
    for B, T in ((1, 1), (2, 3)):
        args = inputs(("exact",), B, T)
        for part in (1, 5):  # k and up
            args["formats"][3 * part + 2] = MODES.index("int8")
        for got, expected in zip(run(OP.call, args), run(op_by_op, args), strict=True):
            assert same_bits(got, expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(name: str, kind: str) -> None:
    """Bitwise: 64 rows of 8 sequences, each sequence alone, and each of its tokens after the other."""
    args = inputs((kind, kind), 8, 8)
    x, keys, values = run(IMPLEMENTATIONS[name], args)
    for b in (0, 3, 7):
        one = slice(b, b + 1)
        rows = {key: args[key][one] for key in ("x", "positions", "start", "prefix")}
        caches = {key: [cache[one].clone() for cache in args[key]] for key in ("k_caches", "v_caches")}
        found = []
        for t in range(8):
            step = {"x": rows["x"][:, t : t + 1], "positions": rows["positions"][:, t : t + 1]}
            at = {"start": rows["start"] + t, "prefix": rows["prefix"] + t}
            found.append(IMPLEMENTATIONS[name](*(args | step | at | caches).values()))
        assert same_bits(torch.cat(found, 1), x[one])
        assert same_bits(torch.stack(caches["k_caches"]), keys[:, one])
        assert same_bits(torch.stack(caches["v_caches"]), values[:, one])


@pytest.mark.parametrize("name", ALL)
def test_no_layers_and_no_rows(name: str) -> None:
    args = inputs(())
    got = ALL[name](*(args | {"windows": []}).values())
    assert torch.equal(got, args["x"])
    assert got.data_ptr() != args["x"].data_ptr()
    assert ALL[name](*inputs(("dense",), 2, 0).values()).shape == (2, 0, WIDTH)
    assert ALL[name](*inputs(("exact",), 0, 3).values()).shape == (0, 3, WIDTH)


def test_opcheck() -> None:
    opcheck(OP.call, tuple(inputs(("dense", "int8", "sparse", "sparse-exact")).values()))


MALFORMED = {
    "shape": ({"x": torch.ones(3, WIDTH)}, r"x must be \[B, T, d\], got.* \[3, 32\]"),
    "rows": ({"x": torch.ones(5, 13, WIDTH)}, "x has 65 rows; up to 64"),
    "norms": ({"norms": [None]}, "1 .*norms|norms has 1 entries"),
    "no norm": ({"norms": [None] * 4}, "norm of layer 0 is missing"),
    "linears": ({"linears": []}, "0 tensors|linears has 0 entries"),
    "no weight": ({"linears": [None] * 42}, "part 0 of layer 0 has no weight"),
    "kinds": ({"formats": [0, 0, 0, 16, 1, 0] + [0] * 15}, "parts 0 .*of layer 0 must.* be dense, or|no scales"),
    "selections": ({"selections": [None] * 3}, "3 selections.* 1 layers"),
    "level": ({"selections": [torch.ones(2), *[None] * 11]}, r"level must be .*\[1\]"),
    "scale": ({"selections": [torch.ones(1), torch.ones(3), *[None] * 10]}, "scale .*must be"),
    "sparse weight": ({"selections": [None] * 6 + [torch.ones(1), *[None] * 5]}, r"weight .*\[32, N\]"),
    "windows": ({"windows": []}, "0 windows|windows has 0 entries"),
    "heads": ({"heads": 0}, "heads=0 must be at least 1"),
    "other heads": ({"heads": 3}, "layer 0 gives 64 numbers for 3 and 2 heads of 8"),
    "activation": ({"activation": 3}, "activation=3 must be 0"),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed(name: str, fault: str) -> None:
    changed, words = MALFORMED[fault]
    with pytest.raises((ValueError, RuntimeError), match=words):
        ALL[name](*(inputs(("dense",)) | changed).values())


def test_public_function() -> None:
    names = tuple(inputs(()))

    def by_name(*values: Any) -> Tensor:
        return scrimp.ops.decoder_layers(**dict(zip(names, values, strict=True)))

    for kinds in (("dense", "exact"), ("sparse", "exact")):
        args = inputs(kinds)
        expected = run(OP.call, args)
        for got, wanted in zip(run(by_name, args | {"activation": "silu"}), expected, strict=True):
            assert same_bits(got, wanted)
    with pytest.raises(ValueError, match="activation='relu' must be one of silu, gelu, gelu_tanh"):
        scrimp.ops.decoder_layers(**args | {"activation": "relu"})
