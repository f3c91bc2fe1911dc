"""Int4Weight: arithmetic by hand, lossless state dicts, and words for everything that does not fit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp import Int4Weight
from scrimp.int4_weight.groups import refine, regroup
from scrimp.int4_weight.pack import bytes_to_words, pack_nibbles, unpack_nibbles, words_to_bytes
from scrimp.testing import random_int4_weight
from scrimp.testing.int4 import KINDS


def by_definition(weight: Int4Weight) -> Tensor:
    """The matrix, one element at a time, in fp32."""
    matrix = torch.zeros(weight.out_features, weight.in_features)
    for n in range(weight.out_features):
        for k in range(weight.columns):
            byte = int(weight.qweight[n, k // 2])
            q, group = byte >> 4 if k % 2 else byte & 15, k // weight.group_size
            s = weight.scales[n, group].float()
            z = torch.tensor(8.0) if weight.zeros is None else weight.zeros[n, group].float()
            if weight.codebook is not None:
                value = weight.codebook[q].float() * s
            else:
                value = q * s + z if weight.zero_kind == "offset" else (q - z) * s
            matrix[n, k if weight.permutation is None else int(weight.permutation[k])] += value
    return matrix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("permuted", [False, True], ids=["plain", "permuted"])
def test_dequantize_is_the_definition(kind: str, permuted: bool) -> None:
    for N, K, group_size, dtype in (
        (3, 32, 16, torch.float16),
        (2, 64, 64, torch.bfloat16),
        (1, 20, 20, torch.float32),
    ):
        weight = random_int4_weight(N, K, group_size, kind, dtype=dtype, permuted=permuted)
        expected = by_definition(weight)
        assert torch.equal(weight.dequantize(), expected)
        assert torch.equal(weight.dequantize(torch.bfloat16), expected.bfloat16())
        torch.testing.assert_close(weight.dequantize(torch.float64).float(), expected)


def test_packing() -> None:
    codes = torch.randint(0, 16, (3, 5, 24), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert int(packed[1, 2, 3]) == int(codes[1, 2, 6]) + 16 * int(codes[1, 2, 7])
    assert torch.equal(unpack_nibbles(packed), codes)
    words = bytes_to_words(packed)
    assert torch.equal(words_to_bytes(words), packed)
    assert (int(words[0, 0, 0]) & 0xFFFFFFFF) == sum(int(codes[0, 0, j]) << 4 * j for j in range(8))
    for empty in (torch.zeros(0, 8, dtype=torch.uint8), torch.zeros(2, 0, dtype=torch.uint8)):
        assert words_to_bytes(bytes_to_words(empty)).shape == empty.shape
    with pytest.raises(ValueError, match="codes must be uint8"):
        pack_nibbles(codes[..., :23])
    with pytest.raises(ValueError, match="packed must be uint8"):
        unpack_nibbles(codes.int())


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict(kind: str) -> None:
    weight = random_int4_weight(3, 64, kind=kind, permuted=True)
    state = weight.state_dict("layer.")
    assert all(name.startswith("layer.") for name in state)
    again = Int4Weight.from_state_dict(state | {"other": torch.ones(1)}, "layer.")
    assert repr(again) == repr(weight)
    for name, tensor in weight.tensors().items():
        assert tensor is None or torch.equal(getattr(again, name), tensor)
    assert weight.bytes() == sum(tensor.nbytes for name, tensor in state.items() if name != "layer.format")


def test_state_dict_errors() -> None:
    state = random_int4_weight(3, 64, kind="uint8").state_dict()
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "missing": ({"scales": None}, "there is no tensor 'scales'"),
        "version": ({"format": torch.tensor([2, 32, 1, 64])}, "format is version 2; this scrimp reads 1"),
        "short": ({"format": torch.tensor([1, 32])}, r"format is \[1, 32\], not"),
        "kind": ({"format": torch.tensor([1, 32, 7, 64])}, r"format is \[1, 32, 7, 64\], not"),
        "dtype": ({"format": torch.ones(4)}, r"format must be int64 \[4\], got torch.float32"),
        "zeros": ({"zeros": None}, "zero_kind='uint8' needs zeros"),
        "group": ({"format": torch.tensor([1, 0, 1, 64])}, "group_size=0 must be 16, 32, 64, 128 or K=64"),
        "inputs": ({"format": torch.tensor([1, 32, 1, 1 << 40])}, "in_features=1099511627776, but the codes have 64"),
        "nan": ({"scales": torch.full((3, 2), torch.nan).half()}, r"scales\[0, 0\] is nan; it must be finite"),
    }
    for change, words in cases.values():
        broken = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        with pytest.raises(ValueError, match=words):
            Int4Weight.from_state_dict(broken)


CODES, SCALES = torch.zeros(2, 64, dtype=torch.int64), torch.ones(2, 2)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"codes": CODES.index_fill(1, torch.tensor([5]), 16)}, r"codes\[0, 5\] is 16; it must be 0 to 15"),
    "float codes": ({"codes": CODES.float()}, "codes must be integers"),
    "odd": ({"codes": CODES[:, 1:]}, "codes must be integers .*even"),
    "no group": ({"scales": SCALES[:, :0]}, r"scales \[2, 0\] do not divide 64 columns"),
    "rows": ({"scales": SCALES[:1]}, r"scales has shape \[1, 2\], expected \[2, 2\]"),
    "inf": ({"scales": torch.tensor([[1.0, 1], [1, torch.inf]])}, r"scales\[1, 1\] is inf; it must be finite"),
    "nan zero": ({"zeros": torch.tensor([[1.0, 1], [torch.nan, 1]])}, r"zeros\[1, 0\] is nan; it must be finite"),
    "codebook": ({"codebook": torch.full((16,), -torch.inf)}, r"codebook\[0\] is -inf; it must be finite"),
    "group size": ({"scales": torch.ones(2, 8)}, "group_size=8 must be 16, 32, 64, 128 or K=64"),
    "input": ({"permutation": torch.arange(1, 65).int()}, r"permutation\[63\] is 64, outside the 64 inputs"),
    "left out": ({"permutation": torch.zeros(64).int()}, "permutation names input 1 of 64 nowhere"),
    "long": ({"permutation": torch.arange(64)}, "permutation is int64; it must be int32"),
    "inputs": ({"in_features": 32}, "in_features=32, but the codes have 64 columns and no permutation"),
    "zero kind": ({"zero_kind": "int4"}, "zero_kind='int4' must be one of none8, uint8, float, offset"),
    "dtype of scales": ({"scales": SCALES.int()}, "scales is int32; it must be float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weight(case: str) -> None:
    changes, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        Int4Weight.from_codes(**({"codes": CODES, "scales": SCALES} | changes))


def test_sizes() -> None:
    weight = random_int4_weight(6, 256, 128, "offset", permuted=True)
    assert (weight.out_features, weight.columns, weight.in_features) == (6, 256, 256)
    assert weight.bytes() == 6 * 128 + 2 * 6 * 2 * 2 + 256 * 4
    assert weight.to("meta").qweight.device.type == "meta"
    assert "device=meta" in repr(weight.to("meta"))
    for N, K in ((0, 32), (3, 0)):
        assert random_int4_weight(N, K).dequantize().shape == (N, K)


def test_refining_changes_no_value() -> None:
    for kind in KINDS:
        weight = random_int4_weight(3, 256, 128, kind, permuted=True)
        assert torch.equal(refine(weight, 32).dequantize(), weight.dequantize())
    with pytest.raises(ValueError, match="groups of 32 cannot be cut into groups of 64"):
        refine(random_int4_weight(1, 64, 32), 64)


@pytest.mark.parametrize(
    ("K", "size", "cut"), [(192, 96, 32), (160, 128, 32), (512, 256, 128), (48, 48, 48), (64, 99, 64)]
)
def test_regrouping_changes_no_value(K: int, size: int, cut: int) -> None:
    """Groups no kernel has (96, 256, a short last one) are cut into the largest that fit."""
    G = -(-K // size)
    codes, scales = torch.randint(0, 16, (4, K), dtype=torch.uint8), torch.rand(4, G)
    zeros = torch.randint(0, 16, (4, G), dtype=torch.uint8)
    for group_of in (torch.arange(K) // size, (torch.arange(K) // size)[torch.randperm(K)]):
        in_order = bool((group_of.diff() >= 0).all())
        sizes = {"group_size": size} if in_order else {"group_of": group_of}
        weight = regroup(pack_nibbles(codes), scales, zeros, **sizes)
        assert weight.validate().group_size == cut
        assert (weight.permutation is None) == in_order
        assert torch.equal(weight.dequantize(), (codes.float() - zeros[:, group_of]) * scales[:, group_of])


def test_regrouping_errors() -> None:
    packed = torch.zeros(1, 40, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"groups of \[40\] columns cannot be cut into groups of 16"):
        regroup(packed, torch.ones(1, 2), group_size=40)
    with pytest.raises(ValueError, match="column 3 is in group 2, but there are 2 groups"):
        regroup(packed, torch.ones(1, 2), group_of=torch.tensor([0, 1, 0, 2] * 20))
    with pytest.raises(ValueError, match="80 columns in groups of 32 do not make 2 groups"):
        regroup(packed, torch.ones(1, 2), group_size=32)
