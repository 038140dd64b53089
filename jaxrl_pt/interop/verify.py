"""Compares an exported folder with the library transformers, which computes it independently."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from jaxrl_pt.models import transformer
from jaxrl_pt.types import Params

_ROWS, _LENGTH = 2, 32
_TOLERANCE = 1e-3  # of the largest logit; both compute in float32


def check(folder: Path, config: cfg.Model, params: Params) -> float:
  """The largest difference of two logits, of random tokens.

  Args:
    folder: the exported folder.
    config: the model's settings, whose weights are not quantised.
    params: the model's parameters.

  Raises:
    UserError: transformers is not installed, cannot load the folder, or computes something else.
  """
  if config.quant != cfg.Quant():
    raise UserError('--verify compares float32 logits, and transformers computes a quantised model '
                    'in arithmetic of its own: leave --verify out.')
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
    with torch.no_grad():
      theirs = model.eval()(torch.from_numpy(tokens)).logits.numpy()
  except Exception as e:
    reason = str(e).strip().split('\n', 1)[0]
    raise UserError(f'transformers cannot load the export ({type(e).__name__}: {reason}), so it '
                    'was not kept.') from e
  difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
  if not difference <= _TOLERANCE * max(1.0, largest):
    raise UserError(f'transformers computes other logits of the export (they differ by up to '
                    f'{difference:.3g}, and the largest is {largest:.3g}), so it was not kept.')
  return difference


def _logits(config: cfg.Model, params: Params, tokens_BT: np.ndarray) -> np.ndarray:
  """f32[B, T, V], computed in float32 whatever the parameters' type."""
  model = transformer.build(config)
  positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

  @jax.jit
  def run(params: Params) -> jax.Array:
    hidden = model.apply(params, jnp.asarray(tokens_BT), positions, jnp.ones_like(tokens_BT))
    return hidden @ model.head(params)

  return np.asarray(run(params))
