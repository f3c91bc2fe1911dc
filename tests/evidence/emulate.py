"""From `scrimp.kernels.launch.Launch` to the PTX emulator: the launch that a GPU would run, compiled and executed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ptx
import torch
from scrimp.kernels.launch import Launch

_TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8",
    torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


def request(launch: Launch, arch: int | str = 80) -> ptx.TritonRequest:
    """What the JIT would compile for these arguments: types, constants of value 1 and None, divisibility by 16."""
    plain = getattr(launch.kernel, "fn", launch.kernel)
    fixed = _not_specialised(launch.kernel)
    signature, attrs, constants = {}, {}, dict(launch.constants)
    for name, value in launch.args.items():
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if value.device.type == "meta" or value.data_ptr() % 16 == 0:
                attrs[name] = 16
        elif value is None:
            constants[name] = None
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int) and value == 1 and name not in fixed:
            constants[name] = 1
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in fixed:
                attrs[name] = 16
        else:
            signature[name] = "fp32"
    return ptx.triton_request(plain, signature, constants, attrs, arch, launch.num_warps, launch.num_stages)


def _not_specialised(kernel: Any) -> set[str]:
    """Parameters named in `do_not_specialize`; an interpreted kernel keeps them among its keyword arguments."""
    if hasattr(kernel, "params"):
        return {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    return set(kernel.kwargs.get("do_not_specialize") or ()) if hasattr(kernel, "kwargs") else set()


def compile_launches(launches: Sequence[Launch], arch: int | str = 80) -> list[ptx.Compiled]:
    return ptx.compile_triton_all([request(launch, arch) for launch in launches])


def execute(
    launches: Sequence[Launch],
    order: str = "lockstep",
    change: Mapping[str, Callable[[str], str]] | None = None,
    short: Mapping[str, Mapping[str, int]] | None = None,
) -> list[ptx.Counters]:
    """Runs the launches one after the other, each as compiled for sm_80; writes into their tensors.

    `change` maps a kernel's name to a change of its PTX, `short` to the bytes that buffers of its lack at their ends.
    Raises `ptx.EmulatorError` at the first fault.
    """
    counters = []
    for launch, compiled in zip(launches, compile_launches(launches), strict=True):
        if 0 in launch.grid:
            continue
        asked = request(launch)
        args: dict[str, Any] = {n: v for n, v in launch.args.items() if n not in asked.constexprs}
        for name, missing in (short or {}).get(compiled.name, {}).items():
            if name in args:  # not every launch of a kernel has every buffer
                args[name] = ptx.bytes_of(args[name], name)[:-missing]
        text = compiled.ptx
        if change and compiled.name in change:
            text = change[compiled.name](text)
            if text == compiled.ptx:
                raise AssertionError(f"the change of {compiled.name} changes nothing")
        counters.append(
            ptx.load(text).launch(compiled.name, launch.grid, 32 * launch.num_warps, args, compiled.shared, order)
        )
    return counters
