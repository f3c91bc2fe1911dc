"""Makes the compressed-tensors golden files: packed and unpacked by loops of its own, as pack-quantized is defined.

See make_gptq.py for what the files hold.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def pack(signed: np.ndarray) -> np.ndarray:
    """[R, C] of -8 to 7 -> int32 [R, ceil(C / 8)]: value + 8, the first in the lowest nibble, zeros behind the last."""
    words = np.zeros((signed.shape[0], -(-signed.shape[1] // 8)), np.uint32)
    for r in range(signed.shape[0]):
        for c in range(signed.shape[1]):
            words[r, c // 8] |= np.uint32((int(signed[r, c]) + 8) << (4 * (c % 8)))
    return words.view(np.int32)


def signed_element(words: np.ndarray, r: int, c: int) -> int:
    return ((int(words[r, c // 8]) & 0xFFFFFFFF) >> (4 * (c % 8)) & 15) - 8


def case(folder: Path, name: str, seed: int, N: int, K: int, **options: object) -> None:
    random = np.random.default_rng(seed)
    strategy, group_size = str(options.get("strategy", "group")), int(options.get("group_size", K))  # type: ignore[call-overload]
    G, asymmetric, actorder = K // group_size, bool(options.get("asymmetric")), bool(options.get("actorder"))
    values, zeros = random.integers(-8, 8, (N, K)), random.integers(-8, 8, (N, G))
    shape = (1,) if strategy == "tensor" else (N, G)
    scales = torch.from_numpy(random.uniform(0.001, 0.02, shape).astype(np.float32))
    tensors = {
        "m.weight_packed": torch.from_numpy(pack(values)),
        "m.weight_scale": scales.to(options.get("dtype", torch.bfloat16)),  # type: ignore[call-overload]
        "m.weight_shape": torch.tensor([N, K]),
    }
    group_of = np.arange(K) // group_size
    if asymmetric:
        by_column = torch.from_numpy(np.ascontiguousarray(pack(zeros.T).T))  # [ceil(N/8), G]
        tensors["m.weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8)) if options.get("int8") else by_column
    if actorder:
        group_of = group_of[random.permutation(K)]
        tensors["m.weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    packed, stored = tensors["m.weight_packed"].numpy(), tensors["m.weight_scale"].float().numpy()
    codes, matrix = np.zeros((N, K), np.uint8), np.zeros((N, K), np.float32)
    for n in range(N):
        for k in range(K):
            q, group = signed_element(packed, n, k), group_of[k]
            zero = int(zeros[n, group]) if asymmetric else 0
            codes[n, k] = q + 8
            matrix[n, k] = np.float32(q - zero) * (stored[0] if strategy == "tensor" else stored[n, group])
    assert (codes.astype(int) - 8 == values).all()
    weights = {"num_bits": 4, "type": "int", "strategy": strategy, "symmetric": not asymmetric}
    weights |= {"group_size": group_size if strategy == "group" else None, "actorder": "group" if actorder else None}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    config["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    save_file(tensors, folder / f"{name}.safetensors", {"config": json.dumps(config)})
    expected = {"codes": torch.from_numpy(codes), "weight": torch.from_numpy(matrix)}
    save_file(expected, folder / f"{name}.expected.safetensors")


def make(folder: Path) -> None:
    case(folder, "ct", 1, N=12, K=128, group_size=64)
    case(folder, "ct_asymmetric", 2, N=20, K=64, group_size=32, asymmetric=True, dtype=torch.float16)
    case(folder, "ct_asymmetric_int8", 3, N=9, K=32, group_size=16, asymmetric=True, int8=True)
    case(folder, "ct_actorder", 4, N=8, K=128, group_size=32, asymmetric=True, actorder=True)
    case(folder, "ct_channel", 5, N=7, K=36, strategy="channel", asymmetric=True, dtype=torch.float32)
    case(folder, "ct_tensor", 6, N=5, K=48, strategy="tensor")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
