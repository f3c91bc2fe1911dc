"""Arithmetic opcodes: which handler of the core an instruction means, with which modifiers."""

from collections.abc import Callable

from .encoder import FLOW_NEXT, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Encoder
from .parser import Instruction, type_bytes

Family = Callable[[Encoder, Instruction], None]
FAMILIES: dict[str, Family] = {}

ROUNDINGS = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rna": 4, "rni": 0, "rzi": 1, "rmi": 2, "rpi": 3}
TYPES = {
    name: index
    for index, name in enumerate(
        ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64", "f16", "bf16", "f32", "f64", "tf32"]
    )
} | {"b8": 1, "b16": 3, "b32": 5, "b64": 7, "f16x2": 13, "bf16x2": 14}
HALVES = ("f16", "f16x2", "bf16", "bf16x2")


def family(*names: str) -> Callable[[Family], Family]:
    """Register a function for the first part of opcodes."""

    def register(function: Family) -> Family:
        for name in names:
            FAMILIES[name] = function
        return function

    return register


def bits_of(type_name: str) -> int:
    return 32 if type_name in ("tf32", "f16x2", "bf16x2") else 8 * type_bytes(type_name)


def is_float(type_name: str) -> bool:
    return type_name in ("f32", "f64")


def _sources(e: Encoder, i: Instruction, type_name: str) -> list[int]:
    kind = "f" if is_float(type_name) else "i"
    return [e.value(name, bits_of(type_name), kind) for name in i.operands[1:]]


def unsigned_name(type_name: str) -> str:
    """``s32``, ``u32``, ``b32`` -> ``32``."""
    return type_name.lstrip("subf")


@family("add", "sub", "mul", "fma", "mad", "div", "min", "max", "rem", "neg", "abs", "sad", "copysign")
def arithmetic(e: Encoder, i: Instruction) -> None:
    """Integers by signedness where it matters; floats plain, or careful with modifiers."""
    base, *modifiers, type_name = i.opcode
    if "cc" in modifiers:
        carries(e, i)
        return
    sources = _sources_wide(e, i) if "wide" in modifiers else _sources(e, i, type_name)
    bits = bits_of(type_name)
    known = {"lo", "hi", "wide", "rn", "rz", "rm", "rp", "ftz", "sat", "full", "approx", "NaN", "relu"}
    unknown = set(modifiers) - known
    if unknown:
        raise e.error(f"unsupported modifier .{sorted(unknown)[0]} of {i.name!r}")
    if type_name in HALVES:
        out = e.out(i.operands[0], 32)
        flags = [name in modifiers for name in ("ftz", "sat", "relu", "NaN")]
        e.emit(f"{base}.{type_name}", [out, *sources], flags)
        return
    if is_float(type_name):
        base = "fma" if base == "mad" else base
        rounding = next((ROUNDINGS[m] for m in modifiers if m in ROUNDINGS), 0)
        mods = [rounding, "ftz" in modifiers, "sat" in modifiers, "NaN" in modifiers]
        suffix = ".careful" if any(mods) else ""
        e.emit(f"{base}.{type_name}{suffix}", [e.out(i.operands[0], bits), *sources], mods)
        return
    part = next((f".{m}" for m in modifiers if m in ("lo", "hi", "wide")), "")
    if "sat" in modifiers:
        e.emit(f"{base}.sat.{type_name}", [e.out(i.operands[0], bits), *sources])
        return
    signless = base in ("add", "sub") or part == ".lo"
    suffix = unsigned_name(type_name) if signless else type_name.replace("b", "u")
    out = e.out(i.operands[0], 2 * bits if part == ".wide" else bits)
    e.emit(f"{base}{part}.{suffix}", [out, *sources])


def _sources_wide(e: Encoder, i: Instruction) -> list[int]:
    bits = bits_of(i.opcode[-1])
    sizes = [bits, bits, 2 * bits]
    return [e.value(name, size) for name, size in zip(i.operands[1:], sizes, strict=False)]


@family("addc", "subc", "madc")
def carries(e: Encoder, i: Instruction) -> None:
    """Extended-precision forms: add.cc, addc, addc.cc and so on share one carry a lane."""
    base, *modifiers, type_name = i.opcode
    reads = base.endswith("c") and base != "sub" and base != "add"
    stem = base.rstrip("c") if base != "subc" else "sub"
    sources = _sources(e, i, type_name)
    operands = [e.out(i.operands[0], bits_of(type_name)), *sources]
    operands += [operands[-1]] * (4 - len(operands)) + [e.special("carry")]
    part = next((f".{m}" for m in modifiers if m in ("lo", "hi")), "")
    suffix = type_name.replace("b", "u") if part == ".hi" else unsigned_name(type_name)
    e.emit(f"{stem}c{part}.{suffix}", operands, [reads, "cc" in modifiers])


@family("mul24", "mad24")
def twenty_four(e: Encoder, i: Instruction) -> None:
    e.emit(i.name, [e.out(i.operands[0], 32), *_sources(e, i, i.opcode[-1])])


@family("dp4a")
def dot4(e: Encoder, i: Instruction) -> None:
    _, left, right = i.opcode
    sources = [e.value(name, 32) for name in i.operands[1:]]
    e.emit("dp4a", [e.out(i.operands[0], 32), *sources], [left == "s32", right == "s32"])


@family("sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def functions(e: Encoder, i: Instruction) -> None:
    base, *modifiers, type_name = i.opcode
    sources = _sources(e, i, type_name)
    out = e.out(i.operands[0], bits_of(type_name))
    if type_name in HALVES:
        e.emit(f"{base}.{type_name}", [out, *sources], ["ftz" in modifiers])
        return
    rounding = next((ROUNDINGS[m] for m in modifiers if m in ROUNDINGS), 0)
    e.emit(f"{base}.{type_name}", [out, *sources], [rounding, "ftz" in modifiers])


@family("testp")
def test_property(e: Encoder, i: Instruction) -> None:
    kinds = ["finite", "infinite", "number", "notanumber", "normal", "subnormal"]
    source = e.value(i.operands[1], bits_of(i.opcode[-1]), "f")
    out = e.predicate_out(i.operands[0])
    e.emit(f"testp.{i.opcode[-1]}", [out, source], [kinds.index(i.opcode[1])])


@family("and", "or", "xor", "not", "cnot")
def logic(e: Encoder, i: Instruction) -> None:
    base, type_name = i.opcode[0], i.opcode[-1]
    if type_name == "pred":
        sources = [e.predicate(name) for name in i.operands[1:]]
        slots = [slot for slot, _ in sources]
        negated = [flag for _, flag in sources]
        e.emit(f"{base}.pred", [e.predicate_out(i.operands[0]), *slots], negated)
        return
    bits = bits_of(type_name)
    width = 64 if bits == 64 else 16 if base == "not" and bits == 16 else 32
    e.emit(f"{base}.{width}", [e.out(i.operands[0], bits), *_sources(e, i, type_name)])


@family("shl", "shr")
def shifts(e: Encoder, i: Instruction) -> None:
    base, type_name = i.opcode
    suffix = unsigned_name(type_name) if base == "shl" else type_name.replace("b", "u")
    bits = bits_of(type_name)
    sources = [e.value(i.operands[1], bits), e.value(i.operands[2], 32)]
    e.emit(f"{base}.{suffix}", [e.out(i.operands[0], bits), *sources])


@family("shf")
def funnel(e: Encoder, i: Instruction) -> None:
    e.emit(".".join(i.opcode[:3]), [e.out(i.operands[0], 32), *_sources(e, i, "b32")])


@family("bfe", "bfi")
def fields(e: Encoder, i: Instruction) -> None:
    base, type_name = i.opcode
    bits = bits_of(type_name)
    full = 2 if base == "bfi" else 1
    sources = [e.value(n, bits if k < full else 32) for k, n in enumerate(i.operands[1:])]
    suffix = str(bits) if base == "bfi" else type_name
    e.emit(f"{base}.{suffix}", [e.out(i.operands[0], bits), *sources])


@family("prmt")
def permute(e: Encoder, i: Instruction) -> None:
    modes = ["b32", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]
    mode = modes.index(i.opcode[-1])
    e.emit("prmt", [e.out(i.operands[0], 32), *_sources(e, i, "b32")], [mode])


@family("lop3")
def lookup(e: Encoder, i: Instruction) -> None:
    if i.opcode != ("lop3", "b32"):
        raise e.error(f"unsupported instruction {i.name!r}")
    sources = [e.value(name, 32) for name in i.operands[1:4]]
    table = e.number(i.operands[4], 32, "i")
    e.emit("lop3", [e.out(i.operands[0], 32), *sources], [table])


@family("popc", "clz", "brev", "bfind")
def counts(e: Encoder, i: Instruction) -> None:
    base, type_name = i.opcode[0], i.opcode[-1]
    bits = bits_of(type_name)
    out = e.out(i.operands[0], bits if base == "brev" else 32)
    suffix = type_name if base == "bfind" else str(bits)
    e.emit(f"{base}.{suffix}", [out, e.value(i.operands[1], bits)], ["shiftamt" in i.opcode])


@family("selp", "slct")
def selection(e: Encoder, i: Instruction) -> None:
    base, type_name = i.opcode[0], i.opcode[1] if i.opcode[0] == "selp" else i.opcode[-2]
    bits = bits_of(type_name)
    kind = "f" if is_float(type_name) else "i"
    width = 64 if bits == 64 else 32
    both = [e.value(name, bits, kind) for name in i.operands[1:3]]
    out = e.out(i.operands[0], bits)
    if base == "selp":
        slot, negated = e.predicate(i.operands[3])
        e.emit(f"selp.{width}", [out, *both, slot], [negated])
        return
    test = i.opcode[-1]
    last = e.value(i.operands[3], 32, "f" if test == "f32" else "i")
    e.emit(f"slct.{width}.{test}", [out, *both, last])


# Comparison -> (primitive, operands swapped, inverted). "u" forms are true for NaN operands.
_COMPARISONS = {
    "eq": ("eq", 0, 0), "ne": ("ne", 0, 0), "lt": ("lt", 0, 0), "le": ("le", 0, 0),
    "gt": ("lt", 1, 0), "ge": ("le", 1, 0), "lo": ("lt", 0, 0), "ls": ("le", 0, 0),
    "hi": ("lt", 1, 0), "hs": ("le", 1, 0), "equ": ("ne", 0, 1), "neu": ("eq", 0, 1),
    "ltu": ("le", 1, 1), "leu": ("lt", 1, 1), "gtu": ("le", 0, 1), "geu": ("lt", 0, 1),
    "num": ("num", 0, 0), "nan": ("num", 0, 1),
}  # fmt: skip


def _compare(e: Encoder, i: Instruction, type_name: str) -> tuple[str, list[int], int]:
    name, swapped, inverted = _COMPARISONS[i.opcode[1]]
    kind = "f" if is_float(type_name) else "i"
    both = [e.value(n, bits_of(type_name), kind) for n in i.operands[1:3]]
    return name, both[::-1] if swapped else both, inverted


@family("setp")
def set_predicate(e: Encoder, i: Instruction) -> None:
    type_name = i.opcode[-1].replace("b", "u") if i.opcode[-1].startswith("b1") else i.opcode[-1]
    type_name = {"b32": "u32", "b64": "u64"}.get(type_name, type_name)
    name, both, inverted = _compare(e, i, type_name)
    outs = [part.strip() for part in i.operands[0].split("|")] + ["_"]
    combine = next((k for k, m in enumerate(("", "and", "or", "xor")) if m and m in i.opcode), 0)
    slot, negated = e.predicate(i.operands[3]) if combine else (0, False)
    operands = [e.predicate_out(outs[0]), e.predicate_out(outs[1]), *both, slot]
    e.emit(f"setp.{name}.{type_name}", operands, [inverted, combine, negated])


@family("set")
def set_value(e: Encoder, i: Instruction) -> None:
    to, of = i.opcode[-2], i.opcode[-1]
    if len(i.operands) != 3 or set(i.opcode[2:-2]) - {"ftz"}:
        raise e.error(f"unsupported instruction {i.name!r}")
    name, both, inverted = _compare(e, i, of)
    one = {"f32": 0x3F800000, "f16": 0x3C00, "f16x2": 0x3C00, "bf16": 0x3F80, "bf16x2": 0x3F80}
    yes = one.get(to, 0xFFFFFFFF)
    e.emit(f"set.{name}.{of}", [e.out(i.operands[0], 32), *both], [inverted, yes])


_WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW, "global": 0, "const": 0}


@family("cvta")
def convert_address(e: Encoder, i: Instruction) -> None:
    back = i.opcode[1] == "to"
    space = i.opcode[2 if back else 1].split("::")[0]
    bits = bits_of(i.opcode[-1])
    if bits != 64:
        raise e.error(f"unsupported instruction {i.name!r}")
    out = e.out(i.operands[0], 64)
    e.emit("cvta", [out, e.value(i.operands[1], 64)], [_WINDOWS[space], back])


@family("isspacep")
def is_space(e: Encoder, i: Instruction) -> None:
    space = i.opcode[1].split("::")[0]
    source = e.value(i.operands[1], 64)
    e.emit("isspacep", [e.predicate_out(i.operands[0]), source], [_WINDOWS[space]])


@family(
    "nop",
    "fence",
    "membar",
    "griddepcontrol",
    "createpolicy",
    "applypriority",
    "discard",
    "prefetch",
    "prefetchu",
    "nanosleep",
    "pmevent",
)
def no_effect(e: Encoder, i: Instruction) -> None:
    """Fences, hints and policies: blocks run one after the other, so nothing is left to do."""
    e.emit("nop", [], [], FLOW_NEXT)
