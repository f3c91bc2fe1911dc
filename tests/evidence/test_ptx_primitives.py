"""The primitives of csrc/common/ptx.cuh, each compiled by nvcc and executed alone."""

from pathlib import Path

import numpy as np
import ptx
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TYPES = {"6__half": torch.float16, "13__nv_bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def module() -> ptx.Module:
    return ptx.load(ptx.compile_cuda(Path(__file__).with_name("primitives_for_tests.cu"), [ROOT / "csrc"]))


def words(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1 << 32, shape, np.uint64).astype(np.uint32)


def test_copies(module: ptx.Module) -> None:
    """16 bytes a lane, zeros where the source is not read: it ends before."""
    x, y, out = words(20, 4), words(32, 4), words(64, 4)
    module.launch("copies", 1, 32, {"x": x, "y": y, "out": out, "count": 20, "both": 1})
    np.testing.assert_array_equal(out[:20], x)
    np.testing.assert_array_equal(out[20:32], 0)
    np.testing.assert_array_equal(out[32:], y)
    with pytest.raises(ptx.EmulatorError, match="out_of_bounds"):
        module.launch("copies", 1, 32, {"x": x, "y": y, "out": out, "count": 21, "both": 1})


def test_a_wait_leaves_the_newest_group_in_flight(module: ptx.Module) -> None:
    x, out = words(32, 4), words(64, 4)
    with pytest.raises(ptx.EmulatorError) as caught:
        module.launch("copies", 1, 32, {"x": x, "y": x, "out": out, "count": 32, "both": 0})
    assert caught.value.kind in ("async_race", "uninitialised")
    np.testing.assert_array_equal(out[:32], x)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices(module: ptx.Module, transposed: bool) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(32, 8)
    rows = ((np.arange(32) * 5 + 3) % 32).astype(np.int32)
    out = words(32, 4)
    module.launch(f"matricesILb{int(transposed)}E", 1, 32, {"x": values, "rows": rows, "out": out})
    for m in range(4):
        matrix = values[rows[8 * m : 8 * m + 8]]
        matrix = np.ascontiguousarray(matrix.T if transposed else matrix)
        np.testing.assert_array_equal(out[:, m], matrix.view(np.uint32).reshape(-1))


@pytest.mark.parametrize("name", TYPES)
def test_products(module: ptx.Module, name: str) -> None:
    a, b, c = torch.randn(16, 16).to(TYPES[name]), torch.randn(16, 8).to(TYPES[name]), torch.randn(16, 8)
    expected = (a.double() @ b.double() + c.double()).float()
    module.launch(f"productsI{name}E", 1, 32, {"a": a, "b": b, "c": c})
    torch.testing.assert_close(c, expected, rtol=2e-7, atol=1e-7)


def test_products_of_bytes(module: ptx.Module) -> None:
    """a has no sign, b has one; sums are exact."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (16, 32)), rng.integers(-128, 128, (32, 8))
    c = rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
    expected = a @ b + c
    module.launch("byte_products", 1, 32, {"a": a.astype(np.uint8), "b": b.astype(np.int8).view(np.uint8), "c": c})
    np.testing.assert_array_equal(c, expected)


def test_masks(module: ptx.Module) -> None:
    of, out = words(32), np.zeros(32, np.uint32)
    module.launch("masks", 1, 32, {"words": of, "out": out, "mask": 0x00F0000F, "bits": 0x64006401})
    np.testing.assert_array_equal(out, of & 0x00F0000F ^ 0x64006401)


@pytest.mark.parametrize("name", TYPES)
def test_numbers(module: ptx.Module, name: str) -> None:
    """The first number of a pair lies in the low half, both rounded to nearest; powers of what is far below are 0."""
    x, packed, powers = 20 * torch.randn(64), torch.zeros(64, dtype=TYPES[name]), torch.zeros(32)
    x[:2] = torch.tensor([-torch.inf, -140.0])
    pairs = torch.zeros(64)
    module.launch(f"numbersI{name}E", 1, 32, {"x": x, "packed": packed, "powers": powers, "pairs": pairs})
    assert torch.equal(pairs.view(32, 2), x.view(32, 2).flip(1))
    assert torch.equal(packed, x.to(TYPES[name]))
    assert powers[:2].tolist() == [0, 0]
    torch.testing.assert_close(powers[2:], torch.exp2(x[2:32].double()).float(), rtol=2**-22, atol=0)
