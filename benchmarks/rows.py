"""One case to its rows: check the result, get the peers ready, time the pairs, compute the figures."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from scrimp.doctor import cpu_model

from . import environment, measure, registry
from .measure import Limits, Probe, Samples
from .registry import Case, Peer, Problem
from .results import Row

FAILURES = ("WRONG", "FAILS")
NUMBERS = ["ours_ms", "peer_ms", "ratio", "ratio_p20", "ratio_p80", "limit_fraction"]
NUMBERS += ["pairs", "gemm_gflops", "stream_gb_s"]
SELF_STANDING = 0.95  # a comparison with ourselves counts from this fraction of the standard's speed


def measured(cases: Sequence[Case], counts: Sequence[int], budget_s: float) -> Iterator[list[Row]]:
    """The rows of every case, one thread count after the other; `budget_s` seconds of timing each."""
    probes: dict[torch.dtype, list[Probe]] = {}
    for case in cases:
        if case.dtype not in probes:
            probes = {case.dtype: measure.probes(case.dtype)}
        torch.manual_seed(0)
        problem = case.make()
        for count in counts:
            with measure.threads(count), torch.no_grad():
                yield case_rows(case, problem, probes[case.dtype], budget_s)


def case_rows(case: Case, problem: Problem, probes: list[Probe], budget_s: float) -> list[Row]:
    """One row per peer at the current thread count. Where a check fails, the numbers are None and `note` says why."""
    ready, notes, extra = prepared(case, problem)
    calls = {name: peer.call for name, peer in ready.items()}
    apart = [name for name, peer in ready.items() if peer.own_threads and torch.get_num_threads() > 1]
    samples = measure.interleave(problem.ours, calls, probes, budget_s, apart) if calls else Samples()
    limits = measure.limits(probes, samples) if calls else None
    for peer in calls:
        if registry.is_self(peer) and problem.standard in calls:
            standing = samples.against(peer, problem.standard)
            if standing < SELF_STANDING:
                notes[peer] = f"does not count: {peer} is at {standing:.2f}x of {problem.standard}"
    derived = problem.derive({peer: samples.ratio(peer).median for peer in calls if not notes[peer]})
    rows = []
    for peer in case.peers:
        row: Row = {"op": case.op, "case": case.name, "dtype": case.dtype_name, "threads": torch.get_num_threads()}
        row |= case.shape
        row |= {**problem.fields, **{name: _rounded(value) for name, value in derived.items()}, "peer": peer}
        row |= extra.get(peer, {})
        row |= figures(peer, samples, limits, problem)
        row |= problem.of_row(row)
        rows.append(row | origin(peer) | {"note": notes[peer]})
    return rows


def prepared(case: Case, problem: Problem) -> tuple[dict[str, Peer], dict[str, str], dict[str, Row]]:
    """The peers that are warm, a note for every peer (empty, or why it has no call), and fields of its own."""
    ready: dict[str, Peer] = {}
    extra: dict[str, Row] = {}
    try:
        expected = problem.ours()
        problem.check(expected)
    except AssertionError as error:
        return ready, dict.fromkeys(case.peers, f"WRONG: {_line(error)}"), extra
    except Exception as error:
        return ready, dict.fromkeys(case.peers, f"FAILS: {type(error).__name__}: {_line(error)}"), extra
    measure.warm_up(problem.ours)
    notes = {}
    for peer in case.peers:
        try:
            notes[peer] = _prepare(peer, case.op, problem, expected, ready, extra)
        except Exception as error:
            notes[peer] = f"FAILS: {type(error).__name__}: {_line(error)}"
    return ready, notes, extra


def _prepare(peer: str, op: str, problem: Problem, expected: Any, ready: dict[str, Peer], extra: dict[str, Row]) -> str:
    """Puts the peer into `ready` and its fields into `extra`, or returns why there is none."""
    if registry.is_self(peer):
        found = Peer(problem.own[peer], same=False)
    else:
        file = registry.peer_file(peer)
        if (reason := file.available()) is not None:
            return f"MISSING: {reason}"
        found = getattr(file, op)(*problem.inputs)
    result = found.call()
    if found.same and (fault := difference(result, expected, found.within)):
        return f"WRONG: {peer} computes something else: {fault}"
    extra[peer] = found.fields((expected, result))
    measure.warm_up(found.call)
    ready[peer] = found
    return ""


def difference(got: Any, expected: Any, within: float) -> str:
    """How a peer's first result differs from our first one by more than rounding; empty if it does not."""
    mine, theirs = (x if isinstance(x, Tensor) else x[0] for x in (expected, got))
    if mine.shape != theirs.shape:
        return f"shape {list(theirs.shape)}, ours {list(mine.shape)}"
    error = ((theirs.float() - mine.float()).norm() / mine.float().norm().clamp(min=1e-30)).item()
    return "" if error <= within else f"relative error {error:.2g}"


def figures(peer: str, samples: Samples, limits: Limits | None, problem: Problem) -> Row:
    """The measured fields, None each where the peer was not timed."""
    if limits is None or peer not in samples.peers:
        return dict.fromkeys(NUMBERS)
    ours, theirs, ratio = median(samples.ours[peer]), median(samples.peers[peer]), samples.ratio(peer)
    found = {
        "ours_ms": 1e3 * ours,
        "peer_ms": 1e3 * theirs,
        "ratio": ratio.median,
        "ratio_p20": ratio.p20,
        "ratio_p80": ratio.p80,
        "limit_fraction": limits.seconds(problem.work) / ours,
        "pairs": len(samples.peers[peer]),
        "gemm_gflops": limits.gemm / 1e9,
        "stream_gb_s": limits.stream / 1e9,
    }
    return {name: _rounded(found[name]) for name in NUMBERS}


def origin(peer: str) -> Row:
    """The fields that say where a number comes from."""
    return {
        "cpu": cpu_model(),
        "isa": environment.isa(),
        "versions": environment.versions("torch" if registry.is_self(peer) else registry.peer_file(peer).DISTRIBUTION),
        "commit": environment.commit(),
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
