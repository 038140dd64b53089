"""The shipped model shapes as values, for tests."""

import functools
from pathlib import Path

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings

ROOT = Path(__file__).resolve().parents[1]
# What gin/run/pretrain_tiny.gin chooses beside its model file, back at the defaults.
_DEFAULTS = ("cfg.Quant.weights = 'none'", "cfg.Quant.activations = 'none'",
             'cfg.Quant.hadamard = False', 'cfg.NextToken.int4_from = 1.0',
             'cfg.Model.sub_norm = False', "cfg.Model.activation = 'swiglu'")


@functools.cache
def shape(name: str) -> cfg.Model:
  """The model of gin/model/<name>.gin, where that file says nothing at its default."""
  chosen = f'cfg.Run.model = @cfg.Model()\ninclude {str(ROOT / "gin/model" / f"{name}.gin")!r}'
  run, _ = gin_bindings.load([str(ROOT / 'gin/run/pretrain_tiny.gin')],
                             ('\n'.join(_DEFAULTS), chosen))
  return run.model


# The trained Llama-shaped model of llama2.c: 260,032 float32 parameters.
STORIES260K = cfg.Model(num_layers=5, d_model=64, d_ff=172, num_heads=8, num_kv_heads=4,
                        head_dim=8, vocab_size=512)
