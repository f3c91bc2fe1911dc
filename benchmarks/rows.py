"""One case to its rows: check the result, get the peers ready, time the pairs, compute the figures."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from . import environment, gpu, measure, registry
from .measure import Limits, Probe, Samples
from .registry import Call, Case, Problem
from .results import Row

FAILURES = ("WRONG", "FAILS")
NUMBERS = ["ours_ms", "peer_ms", "ratio", "ratio_p20", "ratio_p80", "limit_fraction"]
NUMBERS += ["pairs", "gemm_gflops", "stream_gb_s"]
SELF_STANDING = 0.95  # a comparison with ourselves counts from this fraction of the standard's speed
SAME_RMS = 0.02  # relative root mean square by which a peer that claims our results may differ


def measured(cases: Sequence[Case], counts: Sequence[int], budget_s: float, device: str = "cpu") -> Iterator[list[Row]]:
    """The rows of every case, one thread count after the other; `budget_s` seconds of timing each."""
    probes: dict[torch.dtype, list[Probe]] = {}
    for case in cases:
        with torch.device(device):
            if case.dtype not in probes:
                probes = {case.dtype: on_device(measure.probes(case.dtype, *measure.PROBE_SIZES[device]), device)}
            torch.manual_seed(0)
            problem = case.make()
            for count in counts:
                with measure.threads(count), torch.no_grad():
                    yield case_rows(case, problem, probes[case.dtype], budget_s, device)


def on_device(probes: list[Probe], device: str) -> list[Probe]:
    """The probes, captured where they run on a GPU."""
    return probes if device == "cpu" else [replace(probe, call=gpu.Graph(probe.call)) for probe in probes]


def timed(call: Call, case: Case, device: str) -> Call:
    """What is timed for `call`: on a GPU, ops are captured and whole generations waited for."""
    if device == "cpu":
        return call
    return gpu.Synchronised(call) if case.op in registry.WHOLE else gpu.Graph(call)


def case_rows(case: Case, problem: Problem, probes: list[Probe], budget_s: float, device: str = "cpu") -> list[Row]:
    """One row per peer at the current thread count. Where a check fails, the numbers are None and `note` says why."""
    ours, calls, notes, extra = prepared(case, problem, device)
    samples = measure.interleave(ours, calls, probes, budget_s) if calls else Samples()
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
        rows.append(row | origin(peer, device) | {"note": notes[peer]})
    return rows


def prepared(case: Case, problem: Problem, device: str) -> tuple[Call, dict[str, Call], dict[str, str], dict[str, Row]]:
    """Our warm call, those of the peers, a note for every peer (empty, or why it has no call), fields of its own."""
    calls: dict[str, Call] = {}
    extra: dict[str, Row] = {}
    try:
        expected = problem.ours()
        problem.check(expected)
        ours = timed(problem.ours, case, device)
    except AssertionError as error:
        return problem.ours, calls, dict.fromkeys(case.peers, f"WRONG: {_line(error)}"), extra
    except Exception as error:
        return problem.ours, calls, dict.fromkeys(case.peers, f"FAILS: {type(error).__name__}: {_line(error)}"), extra
    measure.warm_up(ours)
    notes = {}
    for peer in case.peers:
        try:
            found = _find(peer, case.op, problem)
            notes[peer] = found if isinstance(found, str) else _wrong(peer, found, expected, extra)
            if isinstance(found, registry.Peer) and not notes[peer]:
                call = timed(found.call, case, device)
                measure.warm_up(call)
                calls[peer] = call
        except Exception as error:
            notes[peer] = f"FAILS: {type(error).__name__}: {_line(error)}"
    return ours, calls, notes, extra


def _find(peer: str, op: str, problem: Problem) -> registry.Peer | str:
    """The peer's way to do the case, or why there is none."""
    if registry.is_self(peer):
        return registry.Peer(problem.own[peer], same=False)
    file = registry.peer_file(peer)
    if (reason := file.available()) is not None:
        return f"MISSING: {reason}"
    found: registry.Peer = getattr(file, op)(*problem.inputs)
    return found


def _wrong(peer: str, found: registry.Peer, expected: Any, extra: dict[str, Row]) -> str:
    """What is wrong with the peer's first result, if anything; its fields go into `extra`."""
    result = found.call()
    if found.same and (fault := difference(result, expected)):
        return f"WRONG: {peer} computes something else: {fault}"
    extra[peer] = found.fields((expected, result))
    return ""


def difference(got: Any, expected: Any) -> str:
    """How a peer's first result differs from our first one by more than rounding; empty if it does not."""
    mine, theirs = (x if isinstance(x, Tensor) else x[0] for x in (expected, got))
    if mine.shape != theirs.shape:
        return f"shape {list(theirs.shape)}, ours {list(mine.shape)}"
    error = ((theirs.float() - mine.float()).norm() / mine.float().norm().clamp(min=1e-30)).item()
    return "" if error <= SAME_RMS else f"relative error {error:.2g}"


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


def origin(peer: str, device: str) -> Row:
    """The fields that say where a number comes from."""
    return {
        "cpu": environment.processor(device),
        "isa": environment.isa(device),
        "versions": environment.versions("torch" if registry.is_self(peer) else registry.peer_file(peer).DISTRIBUTION),
        "commit": environment.commit(),
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
