"""Branch decoding: attention of many rollouts over one shared prefix and their own suffixes."""

from pallas_kernels.branch_decode.api import branch_decode, merge

__all__ = ['branch_decode', 'merge']
