"""Makes the GGUF golden file: bytes laid out by hand after llama.cpp's ggml-common.h and gguf.md.

`blocks.expected.safetensors` holds the fp32 value of every tensor, computed from the bytes one element at a time.
"""

import struct
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ALIGNMENT = 64


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def half_value(data: bytes) -> np.float32:
    return np.float32(struct.unpack("<e", data)[0])


def q4_0(random: np.random.Generator) -> bytes:
    return half(random.uniform(-0.1, 0.1)) + random.bytes(16)


def q4_1(random: np.random.Generator) -> bytes:
    return half(random.uniform(0, 0.1)) + half(random.uniform(-1, 0)) + random.bytes(16)


def q8_0(random: np.random.Generator) -> bytes:
    return half(random.uniform(0, 0.01)) + random.bytes(32)


def values(kind: str, block: bytes) -> list[np.float32]:
    d = half_value(block[:2])
    if kind == "Q8_0":
        return [np.float32(q) * d for q in struct.unpack("<32b", block[2:])]
    codes = block[2:] if kind == "Q4_0" else block[4:]
    elements = [codes[i] & 15 for i in range(16)] + [codes[i] >> 4 for i in range(16)]
    if kind == "Q4_0":
        return [np.float32(q - 8) * d for q in elements]
    return [np.float32(q) * d + half_value(block[2:4]) for q in elements]


def make(folder: Path) -> None:
    random = np.random.default_rng(1)
    blocks = {"a.q4_0": (2, "Q4_0", q4_0), "b.q4_1": (3, "Q4_1", q4_1), "c.q8_0": (8, "Q8_0", q8_0)}
    infos, data, expected = b"", b"", {}

    def add(name: str, number: int, shape: tuple[int, ...], content: bytes) -> None:
        nonlocal infos, data
        data += b"\0" * (-len(data) % ALIGNMENT)
        infos += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        infos += struct.pack("<IQ", number, len(data))
        data += content

    for name, (number, kind, block) in blocks.items():
        rows, columns = 6, 96
        content = [block(random) for _ in range(rows * columns // 32)]
        if kind == "Q8_0":
            content[5] = half(6e4) + content[5][2:]  # 16 d is above fp16's range
        add(name, number, (rows, columns), b"".join(content))
        expected[name] = np.array([v for one in content for v in values(kind, one)], np.float32).reshape(rows, columns)
    vector = random.standard_normal(5).astype(np.float32)
    add("d.f32", 0, (5,), vector.tobytes())
    add("e.f16", 1, (1, 5), vector.astype(np.float16).tobytes())
    add("f.bf16", 30, (5,), (vector.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    add("g.q6_k", 14, (1, 256), random.bytes(210))
    expected |= {"d.f32": vector, "e.f16": vector.astype(np.float16).astype(np.float32)[None]}
    expected["f.bf16"] = (vector.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    entries = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("general.alignment") + struct.pack("<II", 4, ALIGNMENT),
        text("words") + struct.pack("<IIQ", 9, 8, 2) + text("one") + text("zwei"),
        text("numbers") + struct.pack("<IIQ3i", 9, 5, 3, -1, 0, 1),
        text("nested") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ2B", 0, 2, 7, 8),
        text("flag") + struct.pack("<I?", 7, True),
        text("epsilon") + struct.pack("<If", 6, 0.5),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, 7, len(entries)) + b"".join(entries) + infos
    head += b"\0" * (-len(head) % ALIGNMENT)
    (folder / "blocks.gguf").write_bytes(head + data)
    save_file(expected, folder / "blocks.expected.safetensors")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
