"""Which groups dynamic sampling keeps."""

import jax.numpy as jnp
import numpy as np

from jaxrl_pt.rl import advantages, selection


def test_informative_groups():
  correct = jnp.array([[1.0, 0, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 1]])
  valid = jnp.array([[1.0, 1, 1], [1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 0], [0, 0, 0]])
  np.testing.assert_array_equal(selection.informative_groups(correct, valid),
                                [1, 0, 0, 0, 0, 0])


def test_they_are_those_with_an_advantage():
  random = np.random.default_rng(0)
  correct = (random.random((64, 4)) < 0.5).astype(np.float32)
  valid = (random.random((64, 4)) < 0.8).astype(np.float32)
  kept = selection.informative_groups(correct, valid)
  some = (jnp.abs(advantages.mean_centred(correct, valid)) > 1e-6).any(-1)
  np.testing.assert_array_equal(kept, some.astype(jnp.float32))
