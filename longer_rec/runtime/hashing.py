"""SplitMix64 on int64 tensors: the same bits on every device, a function of the value alone."""

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15


def signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch stores."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(value: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), wrapping: a bijection of 64-bit integers."""
    value = (value ^ shift_right(value, 30)) * signed(0xBF58476D1CE4E5B9)
    value = (value ^ shift_right(value, 27)) * signed(0x94D049BB133111EB)
    return value ^ shift_right(value, 31)
