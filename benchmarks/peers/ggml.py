"""What the two ggml peers share: ggml's own libraries, as the llama-cpp-python wheel brings them, driven by ctypes."""

import ctypes
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scrimp import Int4Weight

from ..int4_linear import REQUANTIZED, copies
from ..registry import SAME_RMS, Peer

DISTRIBUTION = "llama-cpp-python"
F32 = 0  # ggml_type
KINDS = {"Q4_0": (2, 32, 18), "Q4_K": (12, 256, 144)}  # ggml_type, elements and bytes of a block
REPACK = "_Z35ggml_backend_cpu_repack_buffer_typev"  # a C++ symbol: interleaves rows where weights are set
DESCRIPTIONS = 1 << 20  # bytes for tensors without data and a graph
POINTER, LONG = c_void_p, c_int64


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


LOG = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void_p)
SILENT = LOG(lambda level, text, data: None)
# function: what it returns, what it takes
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [LOG, POINTER]),
    "ggml_init": (POINTER, [InitParams]),
    "ggml_free": (None, [POINTER]),
    "ggml_new_tensor_2d": (POINTER, [POINTER, c_int, LONG, LONG]),
    "ggml_get_data": (POINTER, [POINTER]),
    "ggml_mul_mat": (POINTER, [POINTER, POINTER, POINTER]),
    "ggml_new_graph": (POINTER, [POINTER]),
    "ggml_build_forward_expand": (None, [POINTER, POINTER]),
    "ggml_quantize_chunk": (c_size_t, [c_int, POINTER, POINTER, LONG, LONG, LONG, POINTER]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, [POINTER, POINTER]),
    "ggml_backend_buffer_free": (None, [POINTER]),
    "ggml_backend_tensor_set": (None, [POINTER, POINTER, c_size_t, c_size_t]),
    "ggml_backend_cpu_buffer_type": (POINTER, []),
    REPACK: (POINTER, []),
    "ggml_backend_cpu_init": (POINTER, []),
    "ggml_backend_cpu_set_n_threads": (None, [POINTER, c_int]),
    "ggml_backend_graph_compute": (c_int, [POINTER, POINTER]),
}


def folder() -> Path | None:
    """Where the libraries are."""
    found = find_spec("llama_cpp")
    return None if found is None or found.origin is None else Path(found.origin).parent / "lib"


def available() -> str | None:
    """llama-cpp-python compiles ggml for this processor when it is installed."""
    place = folder()
    if place is None or not (place / "libggml-cpu.so").exists():
        return "llama_cpp is not installed; make setup-peers, or pip install llama-cpp-python (compiles, some minutes)"
    return None


@cache
def library() -> dict[str, Any]:
    """The functions by name."""
    place: Any = folder()
    parts = [ctypes.CDLL(str(place / f"libggml{part}.so"), ctypes.RTLD_GLOBAL) for part in ("-base", "-cpu")]
    found = {}
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(next(part for part in parts if hasattr(part, name)), name)
        function.restype, function.argtypes = result, arguments
        found[name.removeprefix("ggml_")] = function
    found["log_set"](SILENT, None)
    return found


class Memory:
    """Tensors of ggml with memory of their own, which is freed with the object."""

    def __init__(self) -> None:
        self.ggml = library()
        self.context = self.ggml["init"](InitParams(DESCRIPTIONS, None, True))
        self.buffer: int | None = None

    def tensor(self, kind: int, columns: int, rows: int) -> int:
        """A new tensor."""
        made: int = self.ggml["new_tensor_2d"](self.context, kind, columns, rows)
        return made

    def allocate(self, buffer_type: int) -> None:
        """Room for all tensors made so far."""
        self.buffer = self.ggml["backend_alloc_ctx_tensors_from_buft"](self.context, buffer_type)
        if not self.buffer:
            raise MemoryError("ggml could not allocate its tensors")

    def __del__(self) -> None:
        if self.buffer:
            self.ggml["backend_buffer_free"](self.buffer)
        self.ggml["free"](self.context)


class Matrix(Memory):
    """A weight in the layout that ggml's kernels want."""

    def __init__(self, kind: str, blocks: Tensor, columns: int) -> None:
        super().__init__()
        self.weight = self.tensor(KINDS[kind][0], columns, blocks.shape[0])
        self.allocate(self.ggml[REPACK]())
        self.ggml["backend_tensor_set"](self.weight, blocks.data_ptr(), 0, blocks.nbytes)


class Product(Memory):
    """A graph of one ggml_mul_mat."""

    def __init__(self, matrix: Matrix, x: Tensor, N: int) -> None:
        super().__init__()
        self.matrix, self.shape = matrix, (x.shape[0], N)
        given = self.tensor(F32, x.shape[1], x.shape[0])
        self.result = self.ggml["mul_mat"](self.context, matrix.weight, given)
        self.graph = self.ggml["new_graph"](self.context)
        self.ggml["build_forward_expand"](self.graph, self.result)
        self.allocate(self.ggml["backend_cpu_buffer_type"]())
        self.ggml["backend_tensor_set"](given, x.data_ptr(), 0, x.nbytes)

    def run(self, backend: int) -> Tensor:
        """The result, in ggml's memory."""
        if status := self.ggml["backend_graph_compute"](backend, self.graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        memory = (ctypes.c_float * (self.shape[0] * self.shape[1])).from_address(self.ggml["get_data"](self.result))
        return torch.frombuffer(memory, dtype=torch.float32).view(self.shape)


def int4_linear(kind: str, x: Tensor, weight: Int4Weight) -> Peer:
    """One product for each copy of the weights; codes and scales are ours where the format can hold them."""
    if x.dtype != torch.float32:
        raise ValueError(f"ggml's product takes fp32, not {x.dtype}")
    ggml, x = library(), x.contiguous()
    products = [Product(matrix, x, weight.out_features) for matrix in matrices(kind, weight)]
    backend = ggml["backend_cpu_init"]()
    ggml["backend_cpu_set_n_threads"](backend, torch.get_num_threads())
    for product in products:
        product.run(backend)
    turns = cycle(products)
    within = SAME_RMS if holds(kind, weight) else REQUANTIZED
    return Peer(lambda: next(turns).run(backend), within=within, own_threads=True)


def holds(kind: str, weight: Int4Weight) -> bool:
    """Whether the format has our codes and scales as they are."""
    fits = weight.group_size == 32 and weight.zero_kind == "none8" and weight.scales.dtype == torch.float16
    return kind == "Q4_0" and fits and weight.codebook is None and weight.permutation is None


@lru_cache(maxsize=2)
def matrices(kind: str, weight: Int4Weight) -> list[Matrix]:
    """Copies of the weight."""
    blocks = q4_0(weight) if holds(kind, weight) else quantized(kind, weight)
    return copies(lambda: Matrix(kind, blocks, weight.columns), blocks.nbytes)


def q4_0(weight: Int4Weight) -> Tensor:
    """uint8 `[N, bytes]`: of each block fp16 d, then byte i holds element i low and element 16 + i high."""
    N, K = weight.out_features, weight.columns
    low, high = weight.codes().view(N, K // 32, 2, 16).unbind(2)
    d = weight.scales.unsqueeze(-1).view(torch.uint8)
    return torch.cat((d, low | high << 4), -1).view(N, -1).contiguous()


def quantized(kind: str, weight: Int4Weight) -> Tensor:
    """uint8 `[N, bytes]`: what our weights stand for, quantized by ggml."""
    number, elements, size = KINDS[kind]
    N, K = weight.out_features, weight.columns
    matrix, blocks = weight.dequantize(), torch.empty(N, K // elements * size, dtype=torch.uint8)
    library()["quantize_chunk"](number, matrix.data_ptr(), blocks.data_ptr(), 0, N, K, None)
    return blocks
