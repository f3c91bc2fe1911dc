"""Runs a few lines of PTX once per thread, so that a test can state inputs and results as arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ptx

_TEMPLATE = """
.version 8.8
.target sm_80
.address_size 64
{declarations}
.visible .entry snippet({parameters})
{{
    .reg .pred %p<16>;
    .reg .b16 %h<32>;
    .reg .b32 %r<64>;
    .reg .b64 %l<32>;
    .reg .b32 %tid;
{registers}
    mov.u32 %tid, %tid.x;
{loads}
{body}
{stores}
    ret;
}}
"""


def snippet(body: str, inputs: Sequence[np.ndarray], outputs: Sequence[Any], declarations: str = "") -> str:
    """PTX that loads `%a0, %a1, ...` from the inputs, runs `body`, stores `%d0, %d1, ...`."""
    registers, loads, stores = [], [], []
    dtypes = [("a", array.dtype) for array in inputs] + [("d", np.dtype(kind)) for kind in outputs]
    numbers = [*range(len(inputs)), *range(len(outputs))]
    for parameter, ((letter, dtype), number) in enumerate(zip(dtypes, numbers, strict=True)):
        bits = 8 * dtype.itemsize
        name = f"%{letter}{number}"
        registers.append(f"    .reg .b{max(bits, 16)} {name};\n    .reg .b64 %base{parameter}, %at{parameter};")
        address = [
            f"    ld.param.u64 %base{parameter}, [p{parameter}];",
            f"    mad.wide.u32 %at{parameter}, %tid, {dtype.itemsize}, %base{parameter};",
        ]
        if letter == "a":
            loads += [*address, f"    ld.global.b{bits} {name}, [%at{parameter}];"]
        else:
            stores += [*address, f"    st.global.b{bits} [%at{parameter}], {name};"]
    return _TEMPLATE.format(
        declarations=declarations,
        parameters=", ".join(f".param .u64 p{k}" for k in range(len(dtypes))),
        registers="\n".join(registers),
        loads="\n".join(loads),
        body=body,
        stores="\n".join(stores),
    )


def run(
    body: str,
    inputs: Sequence[Any] = (),
    outputs: Sequence[Any] = (np.uint32,),
    threads: int = 32,
    declarations: str = "",
    **options: Any,
) -> Any:
    """The outputs of `body`; inputs are repeated to one value a thread. One output comes alone."""
    arrays = [np.resize(np.asarray(value), threads) for value in inputs]
    results = [np.full(threads, 0, kind) for kind in outputs]
    module = ptx.load(snippet(body, arrays, outputs, declarations))
    module.launch("snippet", 1, threads, [*arrays, *results], **options)
    return results[0] if len(results) == 1 else results


def count(body: str, inputs: Sequence[Any] = (), threads: int = 32, declarations: str = "", **options: Any) -> Any:
    """The counters of `body`, which stores nothing."""
    arrays = [np.resize(np.asarray(value), threads) for value in inputs]
    module = ptx.load(snippet(body, arrays, (), declarations))
    return module.launch("snippet", 1, threads, arrays, **options)
