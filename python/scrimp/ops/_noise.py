"""Counter-based noise: a number of (seed, position, token) alone, so that whoever asks for a part gets the same."""

import torch
from torch import Tensor

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15  # odd, close to 2^64 / golden ratio: the step of splitmix64


def mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def signed(value: int) -> int:
    """The number of int64 with the same low 64 bits."""
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def uniform(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64, for int64 token ids: `(k + 1/2) / 2^52` of 52 hashed bits.

    The key of (seed, position) is mix(mix(seed) + position GAMMA), the number of a token the top bits of
    mix(key + (id + 1) GAMMA), all modulo 2^64: splitmix64 entered at the token's place.
    """
    key = mix((mix(seed & MASK) + position * GAMMA) & MASK)
    value = (tokens + 1) * signed(GAMMA) + signed(key)
    value = (value ^ _shifted(value, 30)) * signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * signed(0x94D049BB133111EB)
    value = value ^ _shifted(value, 31)
    return (_shifted(value, 12).double() + 0.5) * 2.0**-52


def gumbel(seed: int, position: int, tokens: Tensor) -> Tensor:
    """The noise of tokens, float64."""
    return -torch.log(-torch.log(uniform(seed, position, tokens)))
