"""ONNX Runtime's MatMulNBits with activations of 8 bits (accuracy level 4), on the same codes and scales."""

from functools import lru_cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from scrimp import Int4Weight
from scrimp.int4_weight.pack import pack_nibbles

from ..int4_linear import copies
from ..registry import Peer

DISTRIBUTION = "onnxruntime"
INT8, FP32 = 4, 1  # accuracy levels


def available() -> str | None:
    """onnx writes the model of one node."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed; make setup-peers, or pip install onnxruntime onnx"
    return None


def int4_linear(x: Tensor, weight: Int4Weight, accuracy: int = INT8) -> Peer:
    """Input and output stay where they are (I/O binding)."""
    if x.dtype != torch.float32:
        raise ValueError(f"MatMulNBits on a CPU takes fp32, not {x.dtype}")
    out = torch.empty(x.shape[0], weight.out_features)

    def run(session: Any) -> Tensor:
        binding = session.io_binding()
        binding.bind_input("A", "cpu", 0, "float32", tuple(x.shape), x.data_ptr())
        binding.bind_output("Y", "cpu", 0, "float32", tuple(out.shape), out.data_ptr())
        session.run_with_iobinding(binding)
        return out

    some = sessions(weight, accuracy, torch.get_num_threads())
    for session in some:
        run(session)
    turns = cycle(some)
    return Peer(lambda: run(next(turns)), own_threads=True)


@lru_cache(maxsize=1)
def sessions(weight: Int4Weight, accuracy: int, threads: int) -> list[Any]:
    """Sessions of the one node, each with weights of its own."""
    import onnxruntime

    model = one_node(weight, accuracy)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle sessions must not use the processor

    def session() -> Any:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    return copies(session, weight.qweight.nbytes + 4 * weight.scales.numel())


def one_node(weight: Int4Weight, accuracy: int) -> bytes:
    """A model `Y = A W^T`, serialised."""
    from onnx import TensorProto, helper, numpy_helper

    N, K, g = weight.out_features, weight.columns, weight.group_size
    constants = {
        "B": weight.qweight.view(N, K // g, g // 2).numpy(),
        "S": weight.scales.float().flatten().numpy(),
    }
    if weight.zeros is not None:
        constants["Z"] = pack_nibbles(weight.zeros).flatten().numpy()
    node = helper.make_node(
        "MatMulNBits",
        ["A", *constants],
        ["Y"],
        domain="com.microsoft",
        K=K,
        N=N,
        bits=4,
        block_size=g,
        accuracy_level=accuracy,
    )
    graph = helper.make_graph(
        [node],
        "int4_linear",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["M", K])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["M", N])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    whole: bytes = helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    return whole
