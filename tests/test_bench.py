"""The benchmark harness on a made-up op with a made-up clock."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from scrimp.benchmarks import (
    gpu,
    measure,
    plot,
    registry,
    results,
    rows,
    run,
)
from scrimp.benchmarks.registry import Case, Peer, Problem, Work
from scrimp.benchmarks.results import Row
from torch import Tensor

from scrimp import cli

ORIGIN = ["cpu", "isa", "versions", "commit"]
NUMBERS = ["ours_ms", "peer_ms", "ratio", "ratio_p20", "ratio_p80", "limit_fraction"]
FIELDS = ["op", "case", "dtype", "threads", "m", "peer", *NUMBERS, *ORIGIN]  # of the design, section 5
X = torch.arange(4.0)


def call(cost_s: float, result: Tensor = X, log: list[str] | None = None, name: str = "") -> Callable[[], Tensor]:
    """A call that the clock below says lasts `cost_s`."""

    def run_it() -> Tensor:
        if log is not None:
            log.append(name)
        return result

    run_it.cost = cost_s  # type: ignore[attr-defined]
    return run_it


def matches(got: Tensor) -> None:
    torch.testing.assert_close(got, X)


PEERS = {
    "fast": Peer(call(0.001)),
    "slow": Peer(call(0.006)),
    "other": Peer(call(0.004, 2 * X)),
    "unlike": Peer(call(0.004, 2 * X), same=False),
}


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls with a cost last as long as they say; peers of the names above exist; one is missing, one breaks."""
    clock = measure.seconds

    def seconds(timed: Any) -> float:
        timed()
        return getattr(timed, "cost", None) or clock(timed)

    def peer_file(name: str) -> Any:
        missing = "nothing is installed; pip install nothing" if name == "missing" else None

        def made_up(*inputs: Any) -> Peer:
            if name == "broken":
                raise RuntimeError("no such\nkernel")
            return PEERS[name]

        return SimpleNamespace(DISTRIBUTION="torch", available=lambda: missing, made_up=made_up)

    real = registry.peer_file
    monkeypatch.setattr(measure, "seconds", seconds)
    monkeypatch.setattr(
        registry,
        "peer_file",
        lambda name: real(name) if name not in (*PEERS, "missing", "broken") else peer_file(name),
    )


OURS = call(0.002)
PROBES = [measure.Probe(call(0.001), 1e8, True), measure.Probe(call(0.001), 1e6, False)]


def measured(peers: tuple[str, ...], ours: Callable[[], Tensor] = OURS, **changes: Any) -> list[Row]:
    problem = replace(Problem((X,), ours, matches, Work(bytes=1e6, flops=5e7)), **changes)
    case = Case("made_up", "tiny", torch.float32, {"m": 4}, peers, lambda: problem)
    return rows.case_rows(case, problem, PROBES, budget_s=0.0)


def test_ratio_and_limit() -> None:
    slow, fast = measured(("slow", "fast"))
    assert (slow["ours_ms"], slow["peer_ms"], slow["ratio"], fast["ratio"]) == (2.0, 6.0, 3.0, 0.5)
    assert slow["ratio_p20"] == slow["ratio_p80"] == 3.0
    assert slow["limit_fraction"] == 0.5  # 1e6 bytes at 1e9 bytes/s take 1 ms, the flops half as long
    assert (slow["gemm_gflops"], slow["stream_gb_s"], slow["pairs"]) == (100.0, 1.0, measure.MIN_PAIRS)


def test_ratio_is_the_median_of_pairs() -> None:
    samples = measure.Samples({"p": [1.0, 2.0, 4.0]}, {"p": [2.0, 6.0, 4.0]})
    assert samples.ratio("p").median == 2.0
    spread = measure.Spread.of([float(n) for n in range(11)])
    assert (spread.median, spread.p20, spread.p80) == (5.0, 2.0, 8.0)


def test_calls_alternate() -> None:
    log: list[str] = []
    ours, a, b = (call(0.01, log=log, name=name) for name in "oab")
    measure.interleave(ours, {"a": a, "b": b}, [], budget_s=0.0)
    assert "".join(log) == "oaob" * measure.MIN_PAIRS


def test_budget_sets_the_number_of_pairs() -> None:
    pairs = [len(measure.interleave(call(0.25), {"p": call(0.25)}, [], s).peers["p"]) for s in (0.0, 4.0, 1e9)]
    assert pairs == [measure.MIN_PAIRS, 8, measure.MAX_PAIRS]


def test_pairs_apart_rest_and_wake_first() -> None:
    log: list[str] = []
    ours, a, b = (call(0.01, log=log, name=name) for name in "oab")
    measure.interleave(ours, {"a": a, "b": b}, [], budget_s=0.0, apart=["b"])
    assert "".join(log) == "oaoobb" * measure.MIN_PAIRS


def test_probes_take_a_share_of_the_time() -> None:
    probe = measure.Probe(call(0.2), 1.0, True)
    samples = measure.interleave(call(0.01), {"p": call(0.01)}, [probe], budget_s=4.0)
    assert 2 <= len(samples.probes[0]) <= 4.0 * measure.PROBE_SHARE / 0.2 + 1


def test_stream_rate_is_the_best_probe() -> None:
    probes = [measure.Probe(X.sum, 8.0, False), measure.Probe(X.sum, 30.0, False), measure.Probe(X.sum, 5.0, True)]
    limits = measure.limits(probes, measure.Samples(probes=[[2.0], [3.0], [1.0]]))
    assert (limits.stream, limits.gemm) == (10.0, 5.0)


def test_probes_run() -> None:
    probes = measure.probes(torch.bfloat16, size=8, elements=64)
    assert [probe.is_gemm for probe in probes] == [True, True, False, False]
    for probe in probes:
        probe.call()


@pytest.mark.parametrize(
    ("ours", "note"),
    [(lambda: X + 1, "WRONG: Tensor-likes are not close!"), (lambda: X / "a", "FAILS: TypeError: unsupported")],
    ids=["wrong", "raises"],
)
def test_a_failure_prints_no_number(ours: Callable[[], Tensor], note: str) -> None:
    for row in measured(("slow", "missing"), ours):
        assert row["note"].startswith(note)
        assert [row[name] for name in NUMBERS] == [None] * len(NUMBERS)


def test_peers_that_cannot_be_timed() -> None:
    found = {row["peer"]: row for row in measured(("missing", "other", "broken", "unlike", "slow"))}
    assert found["missing"]["note"] == "MISSING: nothing is installed; pip install nothing"
    assert found["other"]["note"] == "WRONG: other computes something else: relative error 1"
    assert found["broken"]["note"] == "FAILS: RuntimeError: no such kernel"
    assert [found[name]["ratio"] for name in ("missing", "other", "broken")] == [None] * 3
    assert (found["unlike"]["ratio"], found["slow"]["ratio"]) == (2.0, 3.0)


@pytest.mark.parametrize(("cost_s", "counts"), [(0.006, True), (0.0063, True), (0.0065, False)])
def test_a_slow_self_does_not_count(cost_s: float, counts: bool) -> None:
    own, standard = {"self-dense": call(cost_s)}, "slow"
    _, row = measured(
        ("slow", "self-dense"), own=own, standard=standard, derive=lambda r: {"efficiency": r.get("self-dense")}
    )
    assert row["ratio"] == pytest.approx(cost_s / 0.002)
    assert (row["efficiency"] is not None) == counts
    assert row["note"].startswith("" if counts else "does not count: self-dense is at 0.92x of slow")


def command(*words: str) -> int:
    return cli.main(["bench", *words])


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op made_up with a good and a wrong case."""

    def case(name: str, ours: Callable[[], Tensor]) -> Case:
        problem = Problem((X,), ours, matches, Work(1.0, 1.0), fields={"plan": "dense", "n": 4})
        return Case("made_up", name, torch.float32, {"m": 4}, ("slow", "fast"), lambda: problem)

    file = SimpleNamespace(cases=lambda: [case("good", OURS), case("bad", call(0.002, X + 1))])
    monkeypatch.setattr(registry, "ops", lambda: ["made_up"])
    monkeypatch.setattr(registry, "case_file", lambda op: file)
    monkeypatch.setattr(run.scrimp, "implementations", lambda op: {"cpu": None})
    monkeypatch.setattr(measure, "probes", lambda dtype, size, elements: PROBES)


@pytest.mark.usefixtures("made_up")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, table = tmp_path / "rows.json", tmp_path / "rows.csv"
    before = torch.get_num_threads()
    words = ("made_up", "--threads", "1", "2", "--budget", "0", "--json", str(file), "--csv", str(table))
    assert command(*words) == 1
    assert torch.get_num_threads() == before
    found = json.loads(file.read_text())
    assert [(r["case"], r["threads"], r["peer"]) for r in found] == [
        (case, threads, peer) for case in ("good", "bad") for threads in (1, 2) for peer in ("slow", "fast")
    ]
    assert all(set(FIELDS) <= set(row) for row in found)
    printed = capsys.readouterr()
    assert "4 of 8 rows have no number" in printed.err
    assert [line.split()[-2:] for line in printed.out.splitlines() if " good " in line and "fast" in line] == [
        ["we", "lose"],
        ["we", "lose"],
    ]
    assert sum("WRONG" in line for line in printed.out.splitlines()) == 4
    assert results.read(table) == [{name: v if v != "" else None for name, v in row.items()} for row in found]
    assert command("made_up", "--case", "good-fp32", "--threads", "1", "--budget", "0", "--csv", str(table)) == 0
    assert len(results.read(table)) == len(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.usefixtures("made_up")
def test_no_gpu_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("made_up", "--device", "cuda") == 2
    assert "--device cuda needs a GPU that torch can use" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphs_time_what_they_captured() -> None:
    turns = cycle(torch.arange(3.0, device="cuda"))
    graph = gpu.Graph(lambda: next(turns) * 2)
    assert 1 < graph.calls <= gpu.MAX_CALLS
    assert graph().item() in (0.0, 2.0, 4.0)
    assert 0 < graph.seconds() < 1e-3


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name an op or give --all; ops with cases are made_up"),
        (("made_up", "--case", "none"), "no case of made_up has 'none' in its name"),
        (("made_up", "--threads", "0"), "--threads 0 must be at least 1"),
        (("made_up", "--budget", "-1"), "--budget -1.0 must be at least 0 seconds"),
        (("made_up", "--json", "no/such/folder.json"), "folder.json: its folder does not exist"),
    ],
)
def test_mistakes(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*words) == 2
    assert message in capsys.readouterr().err


def test_unknown_op_and_missing_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("nothing") == 2
    said = capsys.readouterr().err
    assert "no benchmark cases for 'nothing'; ops with cases are " in said
    assert "merge_attention" in said
    monkeypatch.setattr(run.scrimp, "implementations", lambda op: {})
    assert command("merge_attention") == 2
    assert "merge_attention has no kernel to measure here" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"merge_attention", "sparse_attention", "peers"} <= set(lines)
    assert any(line.split() == ["blocks-0.25-16384-d128", "fp32", "sdpa,", "self-dense,", "flex"] for line in lines)
    assert any(line.split() == ["sdpa", "ready"] for line in lines)


def drawn(name: str, ratio: float, **fields: Any) -> Row:
    base = {"op": "o", "case": name, "dtype": "fp32", "threads": 1, "peer": "sdpa", "n": 512, "cpu": "c", "isa": "i"}
    base |= {"ratio": ratio, "ratio_p20": ratio, "ratio_p80": ratio, "versions": "v", "commit": "x"}
    return base | fields


def test_plot(tmp_path: Path) -> None:
    some = [drawn("<b>", 0.5), drawn("b", 12.0, n=1024), drawn("none", 1.0) | {"ratio": None}]
    results.update_csv(tmp_path / "rows.csv", some)
    for extra, shape in (([], "rect"), (["--x", "n", "--by", "op"], "circle")):
        assert plot.main([str(tmp_path / "rows.csv"), str(tmp_path / "out.svg"), "--where", "peer=sdpa", *extra]) == 0
        picture = ElementTree.parse(tmp_path / "out.svg").getroot()
        assert len(picture.findall(f"{{http://www.w3.org/2000/svg}}{shape}")) >= 2
    with pytest.raises(ValueError, match="no row with a ratio has peer=flex"):
        plot.select(some, ["peer=flex"])
    with pytest.raises(ValueError, match="several rows of op=o have the same n"):
        plot.lines([drawn("a", 1.0), drawn("b", 1.0)], "n", "op", "title")
