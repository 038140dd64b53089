"""RMSNorm by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.nn.norm import rms_norm


@pytest.mark.parametrize('dtype, rtol', [(jnp.float32, 1e-6), (jnp.bfloat16, 2.0**-8)])
def test_by_hand(dtype, rtol):
  # Mean square 12.5 + 0.5 = 13: the epsilon counts.
  found = rms_norm(jnp.asarray([[3.0, 4.0]], dtype), jnp.asarray([2.0, -0.5]), epsilon=0.5)
  np.testing.assert_allclose(np.asarray(found, np.float64),
                             np.array([[6.0, -2.0]]) / np.sqrt(13), rtol=rtol)
  assert found.dtype == dtype
