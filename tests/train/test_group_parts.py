"""Groups in parts hold the responses of their own prompts, and can be put together again."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.train import group_parts
from jaxrl_pt.types import Prompts

DOCUMENTS, PROMPTS, SAMPLES = 3, 2, 4  # of each


@pytest.mark.parametrize('parts', [1, 2, 4])
def test_a_part_has_its_document_and_a_share_of_each_group(parts):
  doc, prompt, sample = np.indices((DOCUMENTS, PROMPTS, SAMPLES))
  responses = jnp.asarray(100 * doc + 10 * prompt + sample).reshape(-1, SAMPLES)
  prompts = Prompts(jnp.arange(DOCUMENTS)[:, None], jnp.arange(1, DOCUMENTS * PROMPTS + 1),
                    jnp.asarray(10 * doc + prompt)[..., 0].reshape(-1))
  divided = group_parts.split_responses(responses, DOCUMENTS, parts)
  repeated = group_parts.repeat(prompts, parts)
  assert divided.shape == (DOCUMENTS * PROMPTS * parts, SAMPLES // parts)
  np.testing.assert_array_equal(divided // 10, np.repeat(repeated.ids, SAMPLES // parts).reshape(
      divided.shape))
  rows = repeated.ids.reshape(len(repeated.tokens), -1)
  np.testing.assert_array_equal(rows // 10, np.repeat(repeated.tokens, PROMPTS, 1))
  assert sorted(divided.ravel().tolist()) == sorted(responses.ravel().tolist())
  np.testing.assert_array_equal(group_parts.join_responses(divided, DOCUMENTS, parts), responses)
