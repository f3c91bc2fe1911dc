"""Makes the golden file of scrimp's own format, version 1: what the first release wrote, later ones must read.

See make_gptq.py for what the expected file holds; here one matrix a kind.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def make(folder: Path) -> None:
    random = np.random.default_rng(1)
    N, K, g = 5, 64, 32
    tensors, expected = {}, {}
    for kind, name in enumerate(["none8", "uint8", "float", "offset", "codebook"]):
        codes = random.integers(0, 16, (N, K))
        scales = random.uniform(0.001, 0.02, (N, K // g)).astype(np.float16)
        zeros = random.integers(0, 16, (N, K // g)).astype(np.uint8)
        if name in ("float", "offset"):
            zeros = random.uniform(-1, 1, (N, K // g)).astype(np.float16)
        codebook = np.sort(random.standard_normal(16)).astype(np.float32)
        inputs = random.permutation(K).astype(np.int32)
        packed = np.zeros((N, K // 2), np.uint8)
        matrix = np.zeros((N, K), np.float32)
        for n in range(N):
            for k in range(K):
                q, s, z = int(codes[n, k]), np.float32(scales[n, k // g]), np.float32(zeros[n, k // g])
                packed[n, k // 2] |= q << 4 * (k % 2)
                formulas = [np.float32(q - 8) * s, (q - z) * s, (q - z) * s, np.float32(q) * s + z, codebook[q] * s]
                matrix[n, inputs[k] if name == "uint8" else k] = formulas[kind]
        tensors[f"{name}.qweight"], tensors[f"{name}.scales"] = packed, scales
        tensors[f"{name}.format"] = np.array([1, g, kind % 4, K], np.int64)
        if name in ("uint8", "float", "offset"):
            tensors[f"{name}.zeros"] = zeros
        if name == "codebook":
            tensors[f"{name}.codebook"] = codebook
        if name == "uint8":
            tensors[f"{name}.permutation"] = inputs
        expected[name] = matrix
    tensors["norm.weight"] = np.ones(3, np.float32)
    save_file(tensors, folder / "scrimp_v1.safetensors", {"scrimp.int4": json.dumps({"version": 1}), "format": "pt"})
    save_file(expected, folder / "scrimp_v1.expected.safetensors")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
