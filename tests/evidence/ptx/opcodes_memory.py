"""Moves, conversions, memory, warp-wide, tensor-core and control-flow opcodes."""

from .encoder import (
    FLOW_ALIGNED,
    FLOW_BARRIER,
    FLOW_BRANCH,
    FLOW_EXIT,
    FLOW_INDIRECT,
    FLOW_MEMBERS,
    PRED_SINK,
    Encoder,
)  # fmt: skip
from .opcodes import ROUNDINGS, TYPES, bits_of, family, is_float
from .parser import Instruction, type_bytes

_SPACES = {"global": 1, "shared": 2, "local": 3, "param": 4, "const": 1}


def space_of(i: Instruction) -> int:
    """The state space named in the opcode; 0 is generic."""
    for part in i.opcode[1:]:
        if part.split("::")[0] in _SPACES:
            return _SPACES[part.split("::")[0]]
    return 0


@family("mov")
def move(e: Encoder, i: Instruction) -> None:
    """Copies, and packing and unpacking of register tuples."""
    type_name = i.opcode[-1]
    to, source = i.operands
    if type_name == "pred":
        slot, negated = e.predicate(source)
        e.emit("mov.pred", [e.predicate_out(to), slot], [negated])
        return
    bits = bits_of(type_name)
    if to.startswith("{") or source.startswith("{"):
        parts = e.elements(to if to.startswith("{") else source)
        each = bits // len(parts)
        if each == 64:
            raise e.error(f"unsupported instruction {i.name!r}")
        if to.startswith("{"):
            rows = [e.out(name, each) for name in parts]
            e.emit("unpack", [*rows, e.value(source, bits)], [each // 8, len(parts)])
            return
        rows = [e.value(name, each) for name in parts]
        e.emit("pack", [e.out(to, bits), *rows], [each // 8, len(parts)])
        return
    kind = "f" if is_float(type_name) else "i"
    e.emit(f"mov.{64 if bits == 64 else 32}", [e.out(to, bits), e.value(source, bits, kind)])


@family("cvt")
def convert(e: Encoder, i: Instruction) -> None:
    """The fast rows of convert.cpp where they apply, the general form elsewhere."""
    *modifiers, to, of = i.opcode[1:]
    names = {"sat": 1, "satfinite": 2, "relu": 4, "ftz": 8}
    unknown = set(modifiers) - names.keys() - ROUNDINGS.keys()
    if unknown or (to not in TYPES and to not in ("f16x2", "bf16x2")) or of not in TYPES:
        raise e.error(f"unsupported instruction {i.name!r}")
    flags = sum(names[m] for m in modifiers if m in names)
    mode = next((m for m in modifiers if m in ROUNDINGS), "rn")
    rounding = ROUNDINGS[mode]
    if to in ("f16x2", "bf16x2"):
        rows = [e.out(i.operands[0], 32), *(e.value(n, 32, "f") for n in i.operands[1:])]
        if rounding == 0 and not flags & ~8:
            e.emit(f"cvt.{to}.f32", rows)
            return
        e.emit("cvt.pair", rows, [TYPES[to[:-2]], TYPES[of], rounding, flags])
        return
    out, out_bytes = e.any_out(i.operands[0])
    source, source_bytes = e.any_value(i.operands[1], bits_of(of))
    floats = ("f16", "bf16", "f32", "f64", "tf32")
    if to in floats and of in floats and mode.endswith("i"):
        flags |= 16
    key = f"cvt.{to}.{of}"
    fast = {
        "cvt.f32.s32", "cvt.f32.u32", "cvt.f32.f16", "cvt.f32.bf16", "cvt.bf16.f32", "cvt.f16.f32",
    }  # fmt: skip
    plain = rounding == 0 and flags == 0
    if plain and key in fast and out_bytes <= 4 and source_bytes == 4:
        e.emit(key, [out, source])
        return
    if flags == 0 and to not in floats and of not in floats:
        if source_bytes == 4 and out_bytes == 8 and of in ("s32", "u32") and bits_of(to) == 64:
            e.emit(f"cvt.64.{of}", [out, source])
            return
        if source_bytes == 8 and out_bytes == 4 and bits_of(to) == 32 and bits_of(of) == 64:
            e.emit("cvt.32.64", [out, source])
            return
        narrower = bits_of(to) <= bits_of(of) or 8 * out_bytes == bits_of(to)
        if source_bytes == 4 and out_bytes <= 4 and narrower:
            field = to if bits_of(to) <= bits_of(of) else of
            mask = 0xFFFF if out_bytes == 2 else 0xFFFFFFFF
            mods = [32 - bits_of(field), field.startswith("s"), mask]
            e.emit("cvt.narrow", [out, source], mods)
            return
    mods = [TYPES[to], TYPES[of], rounding, flags, out_bytes, source_bytes]
    e.emit("cvt", [out, source], mods)


@family("ld", "ldu")
def load(e: Encoder, i: Instruction) -> None:
    type_name = i.opcode[-1]
    row, wide, offset = e.address(i.operands[1])
    outs = [e.any_out(name) for name in e.elements(i.operands[0])]
    sizes = [size for name, (_, size) in zip(e.elements(i.operands[0]), outs, strict=True) if name != "_"]
    form = int(type_name.startswith("s")) | max(sizes, default=8) << 8
    if type_bytes(type_name) > 8:
        raise e.error(f"unsupported instruction {i.name!r}")
    mods = [space_of(i), type_bytes(type_name), len(outs), form, wide, offset]
    e.emit("ld", [*(out for out, _ in outs), row], mods)


@family("st")
def store(e: Encoder, i: Instruction) -> None:
    type_name = i.opcode[-1]
    bits = bits_of(type_name)
    if i.opcode[1] == "param":  # an argument of a call; the only call that is executed is a trap
        e.emit("nop")
        return
    row, wide, offset = e.address(i.operands[0])
    if len(i.operands) > 2 and "cache_hint" not in i.name:
        raise e.error(f"unsupported instruction {i.name!r}")
    sources = [e.any_value(name, bits) for name in e.elements(i.operands[1])]
    if len({size for _, size in sources}) > 1 or bits > 64:
        raise e.error("sources of different widths")
    mods = [space_of(i), bits // 8, len(sources), sources[0][1] << 8, wide, offset]
    e.emit("st", [row, *(source for source, _ in sources)], mods)


_ATOMICS = ["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"]


@family("atom", "red")
def atomic(e: Encoder, i: Instruction) -> None:
    type_name = i.opcode[-1]
    operation = next((part for part in i.opcode if part in _ATOMICS), None)
    if operation is None or any(part in ("v2", "v4", "v8", "b128") for part in i.opcode):
        raise e.error(f"unsupported instruction {i.name!r}")
    bits = bits_of(type_name)
    returns = i.opcode[0] == "atom"
    operands = list(i.operands)
    out = e.out(operands.pop(0), bits) if returns else 0
    row, wide, offset = e.address(operands.pop(0))
    kind = "f" if is_float(type_name) else "i"
    rows = [e.value(name, bits, kind) for name in operands[: 2 if operation == "cas" else 1]]
    form = TYPES[type_name] | returns << 8
    mods = [space_of(i), bits // 8, _ATOMICS.index(operation), form, wide, offset]
    e.emit("atom", [out, row, *rows], mods)


@family("cp")
def copy_async(e: Encoder, i: Instruction) -> None:
    name = i.name
    if name == "cp.async.commit_group":
        e.emit("cp.async.commit")
        return
    if name == "cp.async.wait_all":
        e.emit("cp.async.wait_all")
        return
    if name == "cp.async.wait_group":
        e.emit("cp.async.wait_group", [], [e.number(i.operands[0], 32, "i")])
        return
    if i.opcode[1:3] not in (("async", "cg"), ("async", "ca")):
        raise e.error(f"unsupported instruction {name!r}")
    shared, shared_wide, shared_offset = e.address(i.operands[0])
    source, source_wide, source_offset = e.address(i.operands[1])
    size = e.number(i.operands[2], 32, "i")
    rest = list(i.operands[3:])
    if "cache_hint" in name and rest:
        rest.pop()
    operands, partial = [shared, source], 0
    if rest and e.entry.width(rest[0].lstrip("!")) == 1:
        slot, negated = e.predicate(rest[0])
        operands.append(slot)
        partial = 3 if negated else 2
    elif rest:
        operands.append(e.value(rest[0], 32))
        partial = 1
    mods = [size, shared_wide, source_wide, shared_offset, source_offset, partial]
    e.emit("cp.async", operands, mods)


@family("shfl")
def shuffle(e: Encoder, i: Instruction) -> None:
    if i.opcode[1] != "sync":
        raise e.error(f"unsupported instruction {i.name!r}")
    outs = [part.strip() for part in i.operands[0].split("|")] + ["_"]
    mode = ["up", "down", "bfly", "idx"].index(i.opcode[2])
    sources = [e.value(name, 32) for name in i.operands[1:5]]
    operands = [e.out(outs[0], 32), e.predicate_out(outs[1]), *sources]
    e.emit("shfl", operands, [mode, 0, 0, 0, 0, 5], FLOW_MEMBERS)


@family("vote")
def vote(e: Encoder, i: Instruction) -> None:
    if i.opcode[1] != "sync":
        raise e.error(f"unsupported instruction {i.name!r}")
    mode = ["all", "any", "uni", "ballot"].index(i.opcode[2])
    out = e.out(i.operands[0], 32) if mode == 3 else e.predicate_out(i.operands[0])
    slot, negated = e.predicate(i.operands[1])
    operands = [out, slot, e.value(i.operands[2], 32)]
    e.emit("vote", operands, [mode, negated, 0, 0, 0, 2], FLOW_MEMBERS)


@family("match")
def match(e: Encoder, i: Instruction) -> None:
    outs = [part.strip() for part in i.operands[0].split("|")] + ["_"]
    bits = bits_of(i.opcode[-1])
    operands = [e.out(outs[0], 32), e.predicate_out(outs[1])]
    operands += [e.value(i.operands[1], bits), e.value(i.operands[2], 32)]
    mods = [i.opcode[1] == "all", bits == 64, 0, 0, 0, 3]
    e.emit("match", operands, mods, FLOW_MEMBERS)


@family("redux")
def redux(e: Encoder, i: Instruction) -> None:
    operation = ["add", "min", "max", "and", "or", "xor"].index(i.opcode[2])
    sources = [e.value(name, 32) for name in i.operands[1:]]
    mods = [operation, i.opcode[-1] == "s32", 0, 0, 0, 2]
    e.emit("redux", [e.out(i.operands[0], 32), *sources], mods, FLOW_MEMBERS)


@family("elect")
def elect(e: Encoder, i: Instruction) -> None:
    outs = [part.strip() for part in i.operands[0].split("|")]
    operands = [e.out(outs[0], 32), e.predicate_out(outs[1]), e.value(i.operands[1], 32)]
    e.emit("elect", operands, [0, 0, 0, 0, 0, 2], FLOW_MEMBERS)


@family("activemask")
def activemask(e: Encoder, i: Instruction) -> None:
    e.emit("activemask", [e.out(i.operands[0], 32)])


_FRAGMENT_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "i8": 8, "i4": 4}
_INTEGERS = {"s8": ("i8", 1), "u8": ("i8", 0), "s4": ("i4", 1), "u4": ("i4", 0)}


@family("mma")
def mma(e: Encoder, i: Instruction) -> None:
    """``mma.sync.aligned.shape.row.col[.satfinite].d.a.b.c``."""
    shape, (to, left, right, of) = i.opcode[3], i.opcode[-4:]
    layout = i.opcode[4:6] == ("row", "col") and i.opcode[1:3] == ("sync", "aligned")
    extra = set(i.opcode[6:-4]) - {"satfinite"}
    kind, sign_a = _INTEGERS.get(left, (left, 0))
    other, sign_b = _INTEGERS.get(right, (right, 0))
    if not layout or extra or kind != other:
        raise e.error(f"unsupported instruction {i.name!r}")
    wide = 64 if kind == "f64" else 32
    parts = [e.elements(operand) for operand in i.operands]
    rows = [e.out(name, wide) for name in parts[0]]
    rows += [e.value(name, wide, "f" if wide == 64 else "i") for part in parts[1:] for name in part]
    size = _FRAGMENT_BITS.get(kind, 0)
    results = [2 if name == "f16" or kind == "f64" else 4 for name in (to, of)]
    k = int(shape.rpartition("k")[2])
    expected = 6 if kind == "f64" else sum(results) + k * (16 + 8) * size // 1024
    if len(rows) != expected:
        raise e.error("wrong number of fragment registers")
    mods = [to == "f16", of == "f16", "satfinite" in i.opcode, sign_a, sign_b]
    e.emit(f"mma.{shape}.{kind}", rows, mods, FLOW_ALIGNED)


@family("ldmatrix", "stmatrix")
def matrix(e: Encoder, i: Instruction) -> None:
    base = i.opcode[0]
    counts = {"x1": 1, "x2": 2, "x4": 4}
    count = next((counts[part] for part in i.opcode if part in counts), None)
    if "m8n8" not in i.opcode or i.opcode[-1] != "b16" or count is None:
        raise e.error(f"unsupported instruction {i.name!r}")
    store_form = base == "stmatrix"
    row, wide, offset = e.address(i.operands[0 if store_form else 1])
    names = e.elements(i.operands[1 if store_form else 0])
    if len(names) != count:
        raise e.error("wrong number of fragment registers")
    rows = [e.value(n, 32) for n in names] if store_form else [e.out(n, 32) for n in names]
    mods = [count, "trans" in i.opcode, wide, offset, space_of(i)]
    e.emit(base, [row, *rows] if store_form else [*rows, row], mods, FLOW_ALIGNED)


@family("movmatrix")
def movmatrix(e: Encoder, i: Instruction) -> None:
    operands = [e.out(i.operands[0], 32), e.value(i.operands[1], 32)]
    e.emit("movmatrix", operands, [], FLOW_ALIGNED)


@family("bra")
def branch(e: Encoder, i: Instruction) -> None:
    target = e.entry.labels.get(i.operands[0])
    if target is None:
        raise e.error(f"unknown label {i.operands[0]!r}")
    e.emit("nop", [], [target], FLOW_BRANCH)


@family("brx")
def indirect_branch(e: Encoder, i: Instruction) -> None:
    names = e.entry.targets[i.operands[1]]
    start = len(e.jumps)
    e.jumps += [e.entry.labels[name] for name in names]
    e.emit("nop", [e.value(i.operands[0], 32)], [start, len(names)], FLOW_INDIRECT)


@family("ret", "exit")
def leave(e: Encoder, i: Instruction) -> None:
    e.emit("nop", [], [], FLOW_EXIT)


@family("trap", "brkpt")
def trap(e: Encoder, i: Instruction) -> None:
    e.emit("trap")


@family("call")
def call(e: Encoder, i: Instruction) -> None:
    """Only the assertion handler, which is a trap; other functions are expected to be inlined."""
    if "__assertfail" not in i.text:
        raise e.error("unsupported instruction 'call' (device functions must be inlined)")
    e.emit("trap")


@family("bar", "barrier")
def barrier(e: Encoder, i: Instruction) -> None:
    if i.opcode[1] == "warp":
        members = e.value(i.operands[0], 32)
        e.emit("nop", [members], [0, 0, 0, 0, 0, 0], FLOW_MEMBERS)
        return
    parts = [part for part in i.opcode[1:] if part != "cta"]
    aligned = i.opcode[0] == "bar" or "aligned" in parts
    kinds = {"sync": 0, "arrive": 1, "red": 2}
    if parts[0] not in kinds:
        raise e.error(f"unsupported instruction {i.name!r}")
    operands = list(i.operands)
    result, source, negated, reduction = PRED_SINK, 0, False, 0
    if parts[0] == "red":
        reduction = next(k for k, op in enumerate(("popc", "and", "or")) if op in parts)
        to = operands.pop(0)
        result = e.out(to, 32) if reduction == 0 else e.predicate_out(to)
        source, negated = e.predicate(operands.pop())
    name = e.value(operands[0], 32)
    count = e.value(operands[1], 32) if len(operands) > 1 else name
    mods = [kinds[parts[0]], aligned, len(operands) > 1, reduction, negated]
    e.emit("nop", [name, count, result, source], mods, FLOW_BARRIER)
