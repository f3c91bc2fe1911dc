"""OpenVINO's matrix product with u4 weights, computing in fp32, on the same codes and scales."""

from functools import lru_cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from scrimp import Int4Weight
from scrimp.int4_weight.pack import pack_nibbles

from ..int4_linear import copies
from ..registry import Peer

DISTRIBUTION = "openvino"


def available() -> str | None:
    """The wheel has its own threads (oneTBB)."""
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed; make setup-peers, or pip install openvino"
    return None


def int4_linear(x: Tensor, weight: Int4Weight) -> Peer:
    """One compiled model a copy of the weights; input and output are not copied."""
    import openvino

    if x.dtype != torch.float32:
        raise ValueError(f"the model takes fp32, not {x.dtype}")
    given = openvino.Tensor(x.numpy(), shared_memory=True)

    def run(request: Any) -> Tensor:
        request.set_input_tensor(given)
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    some = requests(weight, torch.get_num_threads())
    for request in some:
        run(request)  # packs its weights at the first inference of a shape
    turns = cycle(some)
    return Peer(lambda: run(next(turns)), own_threads=True)


@lru_cache(maxsize=1)
def requests(weight: Int4Weight, threads: int) -> list[Any]:
    """Inference requests, each of a model with weights of its own."""
    import openvino

    core, model = openvino.Core(), one_product(weight)
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return copies(lambda: core.compile_model(model, "CPU", config).create_infer_request(), weight.bytes())


def one_product(weight: Int4Weight) -> Any:
    """A model `Y = A W^T`: u4 -> f16, less the zero, times the scale, as optimum-intel writes it."""
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    N, K, g = weight.out_features, weight.columns, weight.group_size
    zeros = torch.full(weight.scales.shape, 8, dtype=torch.uint8) if weight.zeros is None else weight.zeros

    def codes(packed: Tensor, *shape: int) -> Any:
        tensor = openvino.Tensor(openvino.Type.u4, openvino.Shape(shape))
        tensor.data[:] = packed.flatten().numpy()  # openvino holds memory of its own, low nibble first
        return ops.convert(ops.constant(tensor), openvino.Type.f16)

    shifted = ops.subtract(codes(weight.qweight, N, K // g, g), codes(pack_nibbles(zeros.view(1, -1)), N, K // g, 1))
    scales = ops.constant(weight.scales.half().unsqueeze(-1).numpy())
    matrix = ops.reshape(ops.multiply(shifted, scales), np.array([N, K]), False)
    given = ops.parameter([-1, K], openvino.Type.f32, name="A")
    product = ops.matmul(given, ops.convert(matrix, openvino.Type.f32), False, True)
    return openvino.Model([product], [given], "int4_linear")
