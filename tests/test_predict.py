"""Roofline predictions: the arithmetic on a made-up op, and the real cost files."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from scrimp.benchmarks import predict, published
from scrimp.benchmarks import roofline as model
from scrimp.benchmarks.devices import DEVICES, Device
from scrimp.benchmarks.roofline import Count, CountedCase

from scrimp import cli

DEVICE = Device("d", {"16": 1e12, "32": 1e11}, 1e9, 1000, 1e10, "s")
DENSE = Count(bytes=8000, unique_bytes=2000, flops_issued=400, flops_useful=200, exps=10, resident_bytes=900)


def command(*words: str) -> int:
    return cli.main(["bench", *words])


def test_sum() -> None:
    assert DENSE + Count(1, 2, 3, 4, 5, 6) == Count(8001, 2002, 403, 204, 15, 900)


@pytest.mark.parametrize(
    ("count", "dtype", "limit", "time"),
    [
        (Count(8000, 2000, resident_bytes=1000), "bf16", "memory", 2e-6),
        (Count(8000, 2000, resident_bytes=1001), "bf16", "memory", 8e-6),
        (Count(0, 0, flops_issued=10**9, flops_useful=1), "fp16", "tensor cores", 1e-3),
        (Count(0, 0, flops_issued=10**9, flops_useful=1), "fp32", "fp32", 1e-2),
        (Count(1000, 1000, exps=10**8), "bf16", "exponentials", 1e-2),
    ],
)
def test_the_slowest_resource_is_the_limit(count: Count, dtype: str, limit: str, time: float) -> None:
    found = model.predict(count, DEVICE, dtype)
    assert (found.limit, pytest.approx(found.time)) == (limit, time)


def test_devices_are_those_of_the_command_line() -> None:
    for name, device in DEVICES.items():
        assert command("--predict", name, "merge_attention") == 0
        assert device.source
        assert 10 * device.memory < device.flops["16"]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [CountedCase("sparse", "bf16", lambda: DENSE, {"n": 8, "density": 0.25}),
             CountedCase("other", "fp32", lambda: DENSE)]  # fmt: skip
    against = {"theirs": lambda: {"sparse": (DENSE, DENSE + DENSE)}}
    monkeypatch.setattr(predict, "ops", lambda: ["made_up"])
    monkeypatch.setattr(predict, "import_module", lambda name: SimpleNamespace(cases=lambda: cases, AGAINST=against))


@pytest.mark.usefixtures("made_up")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert command("made_up", "--predict", "a100", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert "predicted for NVIDIA A100 SXM4 80 GB, nothing is measured" in printed
    assert "A100 80 GB data sheet" in printed
    first, second = json.loads(file.read_text())
    assert (first["label"], first["n"], first["density"], first["tile_efficiency"]) == ("predicted", 8, 0.25, 0.5)
    assert first["memory_bytes"] == 2000
    assert first["limit"] == "memory"
    assert "timed" in first["assumptions"][0]
    assert second["case"] == "other"
    assert command("--all", "--predict", "a100", "--case", "other-fp32", "--json", str(file)) == 0
    assert [row["case"] for row in json.loads(file.read_text())] == ["other"]


@pytest.mark.usefixtures("made_up")
def test_beside_another_kernel(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert command("made_up", "--predict", "a100", "--against", "theirs", "--json", str(file)) == 0
    assert [(row["kernel"], row["bytes"]) for row in json.loads(file.read_text())] == [
        ("scrimp", 8000),
        ("theirs", 16000),
    ]


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--predict", "h100"), "name an op or give --all; ops with counts are made_up"),
        (("--predict", "h100", "nothing"), "the kernels of 'nothing' are not counted; ops that are: made_up"),
        (("--predict", "h100", "made_up", "--case", "x"), "no case of made_up has 'x' in its name"),
        (("--predict", "h100", "made_up", "--against", "x"), "made_up is not compared with 'x'; there is theirs"),
        (("--predict", "h100", "made_up", "--json", "no/such/folder"), "its folder does not exist"),
        (
            ("--predict", "h100", "made_up", "--csv", "device"),
            "measures nothing: --csv has no meaning with it",
        ),
        (("made_up", "--against", "theirs"), "--against needs --predict and a GPU"),
    ],
)
def test_mistakes(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("made_up")
def test_what_others_publish(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the same table, labelled; filtered by the same words."""
    theirs = published.Published("Somebody", "kernel: sparse, A10", "2x", "a README")
    monkeypatch.setitem(published.PUBLISHED, "made_up", (theirs,))
    file = tmp_path / "rows.json"
    assert command("made_up", "--predict", "a100", "--json", str(file)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("2x")]
    assert len(lines) == 1
    assert lines[0].split()[-3:] == ["published", "Somebody", "2x"]
    row = json.loads(file.read_text())[-1]
    assert (row["label"], row["source"], row["case"]) == ("published", "a README", "kernel: sparse, A10")
    assert command("made_up", "--predict", "a100", "--case", "other", "--json", str(file)) == 0
    assert [row["label"] for row in json.loads(file.read_text())] == ["predicted"]


def test_figures_of_others_are_of_ops_that_are_counted() -> None:
    assert set(published.PUBLISHED) <= set(predict.ops())


@pytest.mark.parametrize("op", predict.ops())
def test_cost_files(op: str) -> None:
    cases = predict.cost_file(op).cases()
    assert len({(case.name, case.dtype) for case in cases}) == len(cases)
    for row in predict.predicted(op, "h100"):
        assert 0 < row["unique_bytes"] <= row["bytes"]
        assert 0 <= row["flops_useful"] <= row["flops_issued"]
        assert row["predicted_us"] > 0
