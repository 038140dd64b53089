"""Compares exports with the models that were exported.

A Hugging Face folder is computed by the library transformers, independently of us. A GGUF file is
read by the package gguf, with its own dequantisers, and computed by our forward.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.interop import gguf_file
from jaxrl_pt.models import transformer
from jaxrl_pt.nn.quant import TernaryWeight, as_computed, ternary
from jaxrl_pt.types import Array, Params

_ROWS, _LENGTH = 2, 32
# Shares of the largest logit; both compute in float32. With int8 activations the two round alike
# except where a value lies between two codes up to the last bit of a float32: then one activation
# takes the neighbouring code, which is 1 / 127 of the largest of its token. So the middle token is
# held to one bound and the worst to another, both far below what a wrong tensor or scale does.
_TOLERANCE = 1e-3
_QUANTISED_MIDDLE, _QUANTISED_WORST = 5e-3, 0.1


def check(folder: Path, config: cfg.Model, params: Params) -> float:
  """The largest difference of two logits, of random tokens.

  Args:
    folder: the exported folder.
    config: the model's settings.
    params: the model's parameters.

  Raises:
    UserError: transformers is not installed, cannot load the folder, or computes something else.
  """
  try:
    import torch
    import transformers
  except ImportError as e:
    raise UserError('--verify compares with the library transformers, which is not installed: '
                    "pip install 'jaxrl_pt[hf]', or leave --verify out.") from e
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (_ROWS, _LENGTH))
  ours = _logits(config, params, tokens.astype(np.int32))
  transformers.utils.logging.disable_progress_bar()
  try:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Its quantisers would be compiled, which needs a C++ compiler and is slower for one call.
    with torch.no_grad(), torch.compiler.set_stance('force_eager'):
      theirs = model.eval()(torch.from_numpy(tokens)).logits.numpy()
  except Exception as e:
    reason = str(e).strip().split('\n', 1)[0]
    raise UserError(f'transformers cannot load the export ({type(e).__name__}: {reason}), so it '
                    'was not kept.') from e
  differences, largest = np.abs(ours - theirs).max(-1), float(np.abs(ours).max())
  difference = float(differences.max())
  if config.quant.activations == 'none':
    is_same = difference <= _TOLERANCE * max(1.0, largest)
  else:
    is_same = (np.median(differences) <= _QUANTISED_MIDDLE * largest
               and difference <= _QUANTISED_WORST * largest)
  if not is_same:
    raise UserError(f'transformers computes other logits of the export (they differ by up to '
                    f'{difference:.3g}, and the largest is {largest:.3g}), so it was not kept.')
  return difference


def check_gguf(path: Path, config: cfg.Model, params: Params, keys: gguf_file.Metadata,
               ternary_type: gguf_file.TernaryType) -> float:
  """The largest difference of two logits, of random tokens, as a share of the largest logit.

  Every tensor of the file has to be the model's to the last bit, with the scales of ternary
  matrices rounded to float16. So the difference shows that rounding and nothing else: by up to
  2⁻¹¹ of itself, after which some activations take the neighbouring code.

  Args:
    path: the exported file.
    config: the model's settings.
    params: the model's parameters.
    keys, ternary_type: as `gguf_file.save_model` took them.

  Raises:
    UserError: the file holds something else.
  """
  read = gguf_file.load_model(path, config, keys, ternary_type)
  pairs = zip(jax.tree_util.tree_leaves_with_path(params),
              jax.tree.leaves(read, is_leaf=lambda x: isinstance(x, TernaryWeight)), strict=True)
  for (where, ours), found in pairs:
    if isinstance(found, TernaryWeight):
      codes, scale = ternary(ours)
      same = (found.codes.astype(jnp.int8) == codes.astype(jnp.int8)).all() and (
          found.scale == scale.astype(jnp.float16).astype(jnp.float32)).all()
    else:
      is_matrix = where[0].key == 'layers' and ours.ndim == 3
      same = jnp.array_equal(found, as_computed(ours, config.quant.weights) if is_matrix else ours)
    if not same:
      name = jax.tree_util.keystr(where, simple=True, separator='/')
      raise UserError(f'{path.name} holds other numbers of {name}, so it was not kept.')
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (_ROWS, _LENGTH))
  before, after = (_logits(config, tree, tokens.astype(np.int32)) for tree in (params, read))
  return float(np.abs(before - after).max() / np.abs(before).max())


def _logits(config: cfg.Model, params: Params, tokens_BT: np.ndarray) -> np.ndarray:
  """f32[B, T, V], computed in float32 whatever the parameters' type."""
  return np.asarray(_run(config, params, jnp.asarray(tokens_BT)))


@functools.partial(jax.jit, static_argnums=0)
def _run(config: cfg.Model, params: Params, tokens_BT: Array) -> Array:
  model = transformer.build(config)
  positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  hidden = model.apply(params, tokens_BT, positions, jnp.ones_like(tokens_BT))
  return hidden @ model.head(params)
