"""Products of 4- or 8-bit activations and ternary weights of 2 bits each."""

from pallas_kernels.ternary_matmul.api import straight_through, ternary_matmul
from pallas_kernels.ternary_matmul.packing import pack_planar, unpack_planar

__all__ = ['pack_planar', 'straight_through', 'ternary_matmul', 'unpack_planar']
