"""HeadPatterns: budgets, files that refuse other weights, and sparse prefill."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scrimp import HeadPatterns, SparsePlan, ops
from scrimp.methods.head_patterns import FORMAT, load, save, shipped_patterns, weight_hash
from scrimp.methods.sparse_attention import sparse_prefill


def budgets(weights: str = "abc") -> dict[str, HeadPatterns]:
    torch.manual_seed(0)
    make = lambda: torch.randint(0, 500, (3, 4)).int()  # noqa: E731
    return {
        "wide": HeadPatterns(make(), make(), sinks=8, weight_hash=weights),
        "narrow": HeadPatterns(make(), make(), segment=256, samples=8, weight_hash=weights),
    }


def test_files_keep_everything(tmp_path: Path) -> None:
    path = tmp_path / "patterns.safetensors"
    save(path, budgets(), "a model")
    for name, read in load(path).items():
        written = budgets()[name]
        assert torch.equal(read.window, written.window)
        assert torch.equal(read.columns, written.columns)
        assert (read.sinks, read.segment, read.samples) == (written.sinks, written.segment, written.samples)
        assert read.weight_hash == "abc"


def test_other_weights_are_refused_with_both_hashes(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    path = tmp_path / "patterns.safetensors"
    save(path, budgets(weight_hash(model)), "linear")
    assert list(load(path, model)) == ["wide", "narrow"]
    old = weight_hash(model)
    model.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=rf"for weights {old} \(linear\), but this model's are {weight_hash(model)}"):
        load(path, model)
    assert shipped_patterns(model) is None


def damaged(kind: str, path: Path) -> None:
    if kind == "pickle":
        path.write_bytes(pickle.dumps(budgets()))
    elif kind == "truncated":
        save(path, budgets(), "m")
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "other format":
        save_file({"x": torch.zeros(1)}, path)
    else:
        save(path, budgets(), "m")
        header: dict = {"format": FORMAT, "version": 1, "weight_hash": "abc", "budgets": {}}
        header |= {
            "newer": {"version": 9},
            "no hash": {"weight_hash": 3},
            "missing tensor": {"budgets": {"gone": {"sinks": 1, "segment": 2, "samples": 1}}},
            "bad number": {"budgets": {"wide": {"sinks": "x", "segment": 2, "samples": 1}}},
            "bad budgets": {"budgets": [1]},
        }[kind]
        tensors = {"wide.window": torch.zeros(1, 1).int(), "wide.columns": torch.zeros(1, 1).int()}
        save_file(tensors, path, metadata={FORMAT: json.dumps(header)})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pickle", "not a file of head patterns, or damaged"),
        ("truncated", "not a file of head patterns, or damaged"),
        ("other format", "not a file of head patterns"),
        ("newer", "version 9 of head patterns; this scrimp reads 1"),
        ("no hash", "has no weight hash"),
        ("missing tensor", "do not fit: 'gone.window'"),
        ("bad number", "do not fit"),
        ("bad budgets", "do not fit"),
    ],
)
def test_damaged_files(kind: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "patterns.safetensors"
    damaged(kind, path)
    with pytest.raises(ValueError, match=words):
        load(path)


def test_bad_budgets() -> None:
    with pytest.raises(ValueError, match=r"window must be int32 \[layers, heads\], got torch.int64 \[2, 2\]"):
        HeadPatterns(torch.zeros(2, 2).long(), torch.zeros(2, 2).int())
    with pytest.raises(ValueError, match=r"columns must be int32 \[layers, heads\], got torch.int32 \[1, 2\]"):
        HeadPatterns(torch.zeros(2, 2).int(), torch.zeros(1, 2).int())
    with pytest.raises(ValueError, match="columns has -4; it must not be negative"):
        HeadPatterns(torch.zeros(2, 2).int(), torch.full((2, 2), -4).int())


def test_one_file_holds_one_model(tmp_path: Path) -> None:
    mixed = {"a": budgets("x")["wide"], "b": budgets("y")["wide"]}
    with pytest.raises(ValueError, match=r"got weight hashes \['x', 'y'\]"):
        save(tmp_path / "f", mixed, "m")


@pytest.mark.parametrize("n", [64, 100, 1000])
def test_expected_keys_bound_the_plan(n: int) -> None:
    patterns = budgets()["wide"]
    q, k = torch.randn(1, 4, n, 8), torch.randn(1, 2, n, 8)
    plan = patterns.plan(1, q, k)
    expected = sum(patterns.expected_keys(1, n, n))
    actual = plan.tile_cost().float().mean(2).sum().item()
    assert actual <= expected + 1e-3
    assert actual >= 0.8 * expected


def test_prefill_is_attention_over_the_plan() -> None:
    patterns = budgets()["narrow"]
    q, k, v = torch.randn(2, 4, 300, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    seen: list[SparsePlan] = []
    out = sparse_prefill(q, k, v, patterns, 2, observers=[lambda layer, plan: seen.append(plan)])
    assert torch.equal(out, ops.sparse_attention(q, k, v, seen[0])[0])
    assert seen[0].n_q == 300


def test_prefill_of_padded_sequences() -> None:
    patterns = budgets()["narrow"]
    q, k, v = torch.randn(2, 4, 200, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    out = sparse_prefill(q, k, v, patterns, 0, starts=[0, 130])
    assert torch.equal(out[:1], sparse_prefill(q[:1], k[:1], v[:1], patterns, 0))
    assert torch.equal(out[1:, :, 30:], sparse_prefill(q[1:, :, 30:], k[1:, :, 130:], v[1:, :, 130:], patterns, 0))
    assert (out[1, :, :30] == 0).all()
