"""Makes the AWQ golden files: packed and unpacked by loops of its own, as AutoAWQ's gemm layout is defined.

See make_gptq.py for what the files hold.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ORDER_MAP = [0, 2, 4, 6, 1, 3, 5, 7]  # slot i of a word holds column ORDER_MAP[i]


def pack_columns(values: np.ndarray) -> np.ndarray:
    """[R, 8C] -> int32 [R, C]."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for r in range(words.shape[0]):
        for c in range(words.shape[1]):
            for slot in range(8):
                words[r, c] |= np.uint32(int(values[r, 8 * c + ORDER_MAP[slot]]) << (4 * slot))
    return words.view(np.int32)


def element(words: np.ndarray, r: int, column: int) -> int:
    """By AutoAWQ's reverse order: column c of eight lies in slot [0, 4, 1, 5, 2, 6, 3, 7][c]."""
    slot = [0, 4, 1, 5, 2, 6, 3, 7][column % 8]
    return (int(words[r, column // 8]) & 0xFFFFFFFF) >> (4 * slot) & 15


def case(folder: Path, name: str, seed: int, N: int, K: int, group_size: int, **fields: object) -> None:
    random = np.random.default_rng(seed)
    G = 1 if group_size == -1 else K // group_size
    codes, zeros = random.integers(0, 16, (K, N)), random.integers(0, 16, (G, N))
    tensors = {
        "m.qweight": pack_columns(codes),
        "m.qzeros": pack_columns(zeros),
        "m.scales": random.uniform(0.001, 0.02, (G, N)).astype(np.float16),
        "m.bias": random.standard_normal(N).astype(np.float16),
    }
    read, matrix = np.zeros((N, K), np.uint8), np.zeros((N, K), np.float32)
    for n in range(N):
        for k in range(K):
            group = k * G // K
            read[n, k] = element(tensors["m.qweight"], k, n)
            zero, scale = element(tensors["m.qzeros"], group, n), np.float32(tensors["m.scales"][group, n])
            matrix[n, k] = np.float32(int(read[n, k]) - zero) * scale
    assert (read == codes.T).all()
    config = {"group_size": group_size, "zero_point": True, **fields}
    save_file(tensors, folder / f"{name}.safetensors", {"config": json.dumps(config)})
    save_file({"codes": read, "weight": matrix}, folder / f"{name}.expected.safetensors")


def make(folder: Path) -> None:
    case(folder, "awq", 1, N=24, K=64, group_size=32, quant_method="awq", bits=4, version="gemm")
    case(folder, "awq_channel", 2, N=8, K=48, group_size=-1, quant_method="awq", bits=4, version="GEMM")
    case(folder, "awq_quant_config", 3, N=8, K=128, group_size=128, w_bit=4, q_group_size=128, version="GEMM")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
