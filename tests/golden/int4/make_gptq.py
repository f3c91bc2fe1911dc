"""Makes the GPTQ golden files: packed and unpacked by loops of its own, as AutoGPTQ and GPTQModel define the layout.

Each `<case>.safetensors` holds the tensors of a module "m" and, in its metadata, the quantization_config; each
`<case>.expected.safetensors` the matrix [N, K] fp32 and the codes that an independent unpacker read back from it.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def pack_rows(values: np.ndarray) -> np.ndarray:
    """[8R, C] -> int32 [R, C]: eight rows in a word, the first in the lowest nibble."""
    words = np.zeros((values.shape[0] // 8, values.shape[1]), np.uint32)
    for r in range(words.shape[0]):
        for c in range(words.shape[1]):
            for j in range(8):
                words[r, c] |= np.uint32(int(values[8 * r + j, c]) << (4 * j))
    return words.view(np.int32)


def nibble(word: np.int32, j: int) -> int:
    return (int(word) & 0xFFFFFFFF) >> (4 * j) & 15


def unpack(tensors: dict[str, np.ndarray], version: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes [N, K], matrix fp32 [N, K]) by the definition, one element at a time."""
    qweight, qzeros, scales = tensors["m.qweight"], tensors["m.qzeros"], tensors["m.scales"]
    K, N = 8 * qweight.shape[0], qweight.shape[1]
    codes, matrix = np.zeros((N, K), np.uint8), np.zeros((N, K), np.float32)
    for n in range(N):
        for k in range(K):
            group = int(tensors["m.g_idx"][k])
            word = int(qzeros[group, n // 8]) & 0xFFFFFFFF
            if version == 1:
                word = (word + 0x11111111) & 0xFFFFFFFF
            zero = word >> (4 * (n % 8)) & 15
            codes[n, k] = nibble(qweight[k // 8, n], k % 8)
            matrix[n, k] = np.float32(int(codes[n, k]) - zero) * np.float32(scales[group, n])
    return codes, matrix


def case(folder: Path, name: str, seed: int, N: int, K: int, group_size: int, version: int, **options: bool) -> None:
    random = np.random.default_rng(seed)
    size = K if group_size == -1 else group_size
    G = -(-K // size)
    codes = random.integers(0, 16, (K, N))
    zeros = np.full((G, N), 8) if options.get("sym") else random.integers(0 if version == 2 else 1, 16, (G, N))
    group_of = np.arange(K) // size
    if options.get("desc_act"):
        group_of = group_of[random.permutation(K)]
    if options.get("borrow"):  # GPTQModel's way from 2 to 1: one subtraction a word, zeros of 0 included
        zeros[:, ::3] = 0
        qzeros = (pack_rows(zeros.T).T.view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    else:  # AutoGPTQ's way: zeros less one, packed
        qzeros = pack_rows(zeros.T - (1 if version == 1 else 0)).T
    tensors = {
        "m.qweight": pack_rows(codes),
        "m.qzeros": np.ascontiguousarray(qzeros),
        "m.scales": random.uniform(0.001, 0.02, (G, N)).astype(np.float16),
        "m.g_idx": group_of.astype(np.int32),
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": options.get("desc_act", False)}
    if version == 2:
        config["checkpoint_format"] = "gptq_v2"
    read, matrix = unpack(tensors, version)
    assert (read == codes.T).all()
    save_file(tensors, folder / f"{name}.safetensors", {"config": json.dumps(config)})
    save_file({"codes": read, "weight": matrix}, folder / f"{name}.expected.safetensors")


def make(folder: Path) -> None:
    case(folder, "gptq_v1", 1, N=16, K=64, group_size=32, version=1)
    case(folder, "gptq_v1_borrow", 2, N=24, K=32, group_size=16, version=1, borrow=True)
    case(folder, "gptq_v1_desc_act", 3, N=8, K=256, group_size=128, version=1, desc_act=True, sym=True)
    case(folder, "gptq_v2", 4, N=40, K=64, group_size=16, version=2)
    case(folder, "gptq_v2_desc_act", 5, N=16, K=128, group_size=32, version=2, desc_act=True)
    case(folder, "gptq_v2_ragged", 6, N=16, K=96, group_size=64, version=2, sym=True)
    case(folder, "gptq_v2_ragged_desc_act", 7, N=8, K=80, group_size=32, version=2, desc_act=True)
    case(folder, "gptq_v2_channel", 8, N=8, K=40, group_size=-1, version=2)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
