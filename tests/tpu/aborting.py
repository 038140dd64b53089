"""A child that ends as libtpu does when one of its own checks fails."""

import os
import sys

print('F1127 1 emitter.cc:13] Check failed: buffer != nullptr', file=sys.stderr, flush=True)
os.abort()
