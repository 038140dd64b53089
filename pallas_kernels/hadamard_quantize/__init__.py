"""RMSNorm, Hadamard rotation and quantisation of activations in one pass."""

from pallas_kernels.hadamard_quantize.api import hadamard_quantize

__all__ = ['hadamard_quantize']
