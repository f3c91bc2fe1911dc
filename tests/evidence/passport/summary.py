"""The tables of docs/gpu-evidence.md, from the passports and the list of subjects."""

from collections.abc import Iterable

from cuda_subjects import CudaSubject
from subjects import SUBJECTS, Subject

from . import compiled, cuda, demands, records
from .records import Record

DOCUMENT = compiled.ROOT / "docs" / "gpu-evidence.md"
BEGIN, END = "<!-- written by `make evidence` -->\n", "<!-- end -->\n"


def written(document: str) -> str:
    """The document with its tables as they must be."""
    before, rest = document.split(BEGIN, 1)
    return before + BEGIN + "\n" + tables() + "\n" + END + rest.split(END, 1)[1]


def tables() -> str:
    """The tables of Triton's kernels and those in CUDA C++ as Markdown."""
    return _table(
        ["op", "kernels compiled", "spills", "emulated (warp by warp)", "interpreted", "faults caught, equivalent",
         "useful sector bytes", "bank conflicts", "demands not met"],
        [_op(op) for op in SUBJECTS],
    ) + "\n" + _table(
        ["kernel", "architecture", "configuration", "registers", "shared memory", "resident blocks", "hot loops"],
        [row for op in SUBJECTS for row in _kernels(op)],
    ) + "\n" + _table(
        ["op in CUDA C++", "kernels compiled", "spills", "emulated (warp by warp)", "faults caught, equivalent",
         "useful sector bytes", "bank conflicts", "demands not met"],
        [_cuda_op(op) for op in cuda.SUBJECTS],
    ) + "\n" + _table(
        ["kernel in CUDA C++", "architecture", "registers", "shared memory", "resident blocks", "hot loops"],
        [_kernel(record) for op in cuda.SUBJECTS for record in cuda.checked_in(op)["kernels"]],
    )  # fmt: skip


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _op(op: str) -> list[str]:
    return _evidence(SUBJECTS[op], records.checked_in(op), [str(len(SUBJECTS[op].interpreted))])


def _cuda_op(op: str) -> list[str]:
    return _evidence(cuda.SUBJECTS[op], cuda.checked_in(op), [])


def _evidence(subject: Subject | CudaSubject, passport: Record, interpreted: list[str]) -> list[str]:
    kernels, launches = passport["kernels"], passport["reference"]["launches"]
    held = [record for record in kernels if record["arch"] in demands.ARCHES]
    planted = sum(bool(mutant.caught_by) for mutant in subject.mutants.values())
    sectors, useful = (sum(launch[name] for launch in launches) for name in ("sectors", "useful_bytes"))
    shared, conflicted = (
        sum(launch[name] for launch in launches) for name in ("shared_accesses", "conflicted_accesses")
    )
    return [
        f"`{subject.op}`",
        str(len(kernels)),
        str(sum(record["spills"] > 0 for record in held)),
        f"{len(subject.cases)} ({len(subject.warp_cases)})",
        *interpreted,
        f"{planted}, {len(subject.mutants) - planted}",
        f"{useful / sectors / 32:.1%}",
        f"{conflicted} of {shared}" if shared else "no shared memory",
        str(len(passport["unmet"])),
    ]


def _kernels(op: str) -> list[list[str]]:
    """The default configurations on sm_80 and sm_90."""
    wanted = {compiled.arch_name(arch) for arch in compiled.DEFAULT_ARCHES}
    defaults = SUBJECTS[op].defaults or list(SUBJECTS[op].shipped)
    shown = [record for record in records.checked_in(op)["kernels"]
             if record["arch"] in wanted and record["config"] in defaults]  # fmt: skip
    return [[*_kernel(record)[:2], record["config"], *_kernel(record)[2:]] for record in shown]


def _kernel(record: Record) -> list[str]:
    loops = []
    for loop in record["hot_loops"]:
        parts = [f"{sum(loop[name].values())} {word}" for name, word in
                 (("tensor", "tensor-core"), ("async_copies", "asynchronous copies")) if loop.get(name)]  # fmt: skip
        loops.append(f"{loop['instructions']} instructions" + "".join(f", {part}" for part in parts))
    return [
        f"`{record['kernel']}`", record["arch"], str(record["registers"]),
        f"{record['static_shared'] + record['dynamic_shared']:,} bytes", record["occupancy"][record["arch"]],
        "; ".join(loops),
    ]  # fmt: skip
