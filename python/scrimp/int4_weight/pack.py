"""Two 4-bit codes in a byte: the low nibble holds the even position, the high nibble the odd one after it."""

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes uint8 `[..., K]` of 0 to 15, K even -> uint8 `[..., K/2]`.

    >>> pack_nibbles(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist()
    [[33, 15]]
    """
    if codes.dtype != torch.uint8 or codes.shape[-1] % 2:
        raise ValueError(f"pack_nibbles: codes must be uint8 [..., even], got {codes.dtype} {list(codes.shape)}")
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 `[..., K/2]` -> codes uint8 `[..., K]`.

    >>> unpack_nibbles(torch.tensor([[33, 15]], dtype=torch.uint8)).tolist()
    [[1, 2, 15, 0]]
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"unpack_nibbles: packed must be uint8, got {packed.dtype}")
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def words_to_bytes(words: Tensor) -> Tensor:
    """int32 `[..., W]` of eight codes, lowest nibble first -> uint8 `[..., 4 W]` of two codes, low nibble first.

    >>> words_to_bytes(torch.tensor([[0x76543210]], dtype=torch.int32)).tolist()
    [[16, 50, 84, 118]]
    """
    shifts = torch.arange(0, 32, 8, device=words.device, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts & 255).to(torch.uint8).flatten(-2)


def bytes_to_words(packed: Tensor) -> Tensor:
    """uint8 `[..., 4 W]` -> int32 `[..., W]`, the inverse of `words_to_bytes`.

    >>> hex(bytes_to_words(torch.tensor([16, 50, 84, 118], dtype=torch.uint8)).item())
    '0x76543210'
    """
    four = packed.unflatten(-1, (packed.shape[-1] // 4, 4)).to(torch.int32)
    return four[..., 0] | four[..., 1] << 8 | four[..., 2] << 16 | four[..., 3] << 24
