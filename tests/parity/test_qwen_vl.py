"""Rotary positions of images against transformers' Qwen2-VL and Qwen3-VL."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from transformers import vision_utils  # noqa: E402
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2  # noqa: E402
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3  # noqa: E402

from jaxrl_pt import config as cfg  # noqa: E402
from jaxrl_pt.nn import embed, images  # noqa: E402
from jaxrl_pt.nn import image_positions as positions  # noqa: E402

pytestmark = pytest.mark.parity

RNG = np.random.default_rng(0)
PLAIN = cfg.PlainRope()


@pytest.mark.parametrize('rows, columns, head_dim', [(4, 6, 80), (2, 10, 16)])
def test_rotations_of_patches(rows, columns, head_dim):
  config = transformers.Qwen2VLConfig().vision_config
  config.embed_dim, config.num_heads = 2 * head_dim, 2
  assert config.rope_parameters['rope_theta'] == 10_000
  # With squares of one patch their order is ours, row by row.
  places = vision_utils.get_vision_position_ids(torch.tensor([[1, rows, columns]]), 1)
  x = torch.from_numpy(RNG.normal(size=(2, rows * columns, 2, head_dim)).astype(np.float32))
  cos, sin = qwen2.Qwen2VLVisionRotaryEmbedding(config)(x, places)
  q, k = qwen2.apply_rotary_pos_emb_vision(x[0], x[1], cos, sin)
  ours = positions.rope_2d(*positions.places(rows, columns), head_dim)
  for angle, theirs in zip(ours, (cos, sin), strict=True):
    np.testing.assert_allclose(np.tile(angle[0, :, 0], 2), theirs.numpy(), atol=1e-6)
  for mine, theirs in zip(x.numpy(), (q, k), strict=True):
    np.testing.assert_allclose(embed.rotate(jnp.asarray(mine[None]), *ours)[0], theirs.numpy(),
                               atol=1e-5)


def test_patches_are_merged_in_their_order():
  """Their patches come square by square, so that four neighbours in a row become a token."""
  rows, columns = 4, 6
  row, column = positions.places(rows, columns)
  theirs = vision_utils.get_vision_position_ids(torch.tensor([[1, rows, columns]]), 2)
  ours = images.patchify(jnp.stack([row, column], -1).reshape(1, rows, columns, 2), 2)
  np.testing.assert_array_equal(np.asarray(ours).reshape(-1, 2), theirs.numpy())


def _their_rope(kind, head_dim, sections):
  parameters = {'rope_type': 'default', 'rope_theta': 5e5, 'mrope_section': list(sections)}
  if kind == 'mrope':
    return qwen2.Qwen2VLRotaryEmbedding(transformers.Qwen2VLConfig(text_config={
        'hidden_size': 2 * head_dim, 'num_attention_heads': 2, 'num_key_value_heads': 2,
        'rope_parameters': parameters}).text_config)
  return qwen3.Qwen3VLTextRotaryEmbedding(transformers.Qwen3VLConfig(text_config={
      'head_dim': head_dim, 'rope_parameters': {**parameters, 'mrope_interleaved': True}
  }).text_config)


@pytest.mark.parametrize('kind, head_dim, sections', [
    ('mrope', 128, (16, 24, 24)), ('mrope', 32, (4, 6, 6)), ('interleaved', 128, (24, 20, 20)),
    ('interleaved', 64, (12, 10, 10))])
def test_rotations_of_texts_with_images(kind, head_dim, sections):
  places = RNG.integers(0, 200, (3, 2, 9))
  theirs = _their_rope(kind, head_dim, sections)(torch.zeros(2, 9, 1), torch.from_numpy(places))
  ours = positions.rope(jnp.asarray(places), head_dim, 5e5, PLAIN, kind)
  for angle, other in zip(ours, theirs, strict=True):
    # An angle of 200 is off by up to 200 · 2⁻²⁴, and as much by the frequency's rounding.
    np.testing.assert_allclose(np.tile(angle[:, :, 0], 2), other.numpy(), atol=5e-5)


@pytest.mark.parametrize('model', [qwen2.Qwen2VLModel, qwen3.Qwen3VLModel])
def test_positions_of_texts_with_images(model):
  """Random rows of words and images; their images are counted in patches, of which 2 × 2 are a
  token, and are never side by side."""
  length, is_image, grids, sizes = 50, [], np.zeros((8, 9, 3), np.int32), []
  for b in range(8):
    row, number = [], 0
    while len(row) < length:
      shape = 1, *RNG.integers(1, 5, 2).tolist()
      if row and not row[-1] and RNG.random() < 0.4 and len(row) + np.prod(shape) <= length:
        row += [True] * int(np.prod(shape))
        grids[b, number], number = shape, number + 1
        sizes.append((1, 2 * shape[1], 2 * shape[2]))
      else:
        row.append(False)
    is_image.append(row)
  owner = types.SimpleNamespace(
      config=types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=2)))
  owner.get_vision_position_ids = types.MethodType(model.get_vision_position_ids, owner)
  theirs, deltas = model.get_rope_index(
      owner, torch.zeros(8, length, dtype=torch.long), torch.tensor(is_image).int(),
      image_grid_thw=torch.tensor(sizes))
  assert len(sizes) > 20
  for kind in ('mrope', 'interleaved'):
    ours = positions.token_positions(jnp.array(is_image), jnp.array(grids), kind)
    np.testing.assert_array_equal(ours, theirs.numpy())
    np.testing.assert_array_equal(ours.max((0, 2)) + 1 - length, deltas[:, 0].numpy())
