"""The weight sync of a ternary policy compiles where a chip's part of a weight has ten rows."""

import pytest

from jaxrl_pt.tpu import child

pytest.importorskip('libtpu')


@pytest.mark.slow
def test_it_compiles_for_256_chips():
  assert list(child.rows('tests.tpu.compiled_weight_sync')) == [{'codes': 7}]
