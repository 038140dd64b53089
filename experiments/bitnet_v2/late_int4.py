"""Training of the experiment: a model at 8 bits, and its branches at 4 bits over the last steps.

A `Setting` is trained from its first step with int8 (or other) activations. At `SWITCH` of the
steps each branch goes on from the same parameters, optimiser state, schedule and batches with
activations of its own; so two branches of one model differ in their quantiser alone.
"""

from collections.abc import Callable, Iterator
import dataclasses
from dataclasses import dataclass
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import loader, sources, splits
from jaxrl_pt.models import transformer
from jaxrl_pt.models.base import Model, unstacked
from jaxrl_pt.nn import ops
from jaxrl_pt.nn import quant as q
from jaxrl_pt.nn.norm import rms_norm
from jaxrl_pt.train import losses, optim, step
from jaxrl_pt.types import Array, Batch, Params, TrainState
from pallas_kernels.hadamard_quantize import reference

BATCH, LENGTH, VOCAB = 8, 128, 512
SWITCH = 0.95  # of the steps, as in the paper
EVAL_BATCHES = 32
WIDTH, FF, LAYERS = 128, 512, 4
RATE, RATES = 6e-3, (3e-3, 1.2e-2)  # The peak rate of the ternary models, and what else is tried.
# Channels of each SubLN whose gain starts at PLANTED, in the setting of that name.
PLANTED_SHARE, PLANTED = 1 / 64, 20.0


# --- What W_o and W_down read -------------------------------------------------------


def _quantised(x_r: Array, kind: cfg.ActivationQuant) -> tuple[Array, Array, Array]:
  codes, scale = q.activations(jax.lax.stop_gradient(x_r), kind)
  return x_r, codes, scale


def plain(x: Array, gain: Array | None, epsilon: float,
          kind: cfg.ActivationQuant) -> tuple[Array, Array, Array]:
  """`ops.rotated` without a rotation: norm and quantiser."""
  return _quantised(x if gain is None else rms_norm(x, gain, epsilon), kind)


def _order(width: int) -> Array:
  return jax.random.permutation(jax.random.key(0), width)


def permuted(x: Array, gain: Array | None, epsilon: float,
             kind: cfg.ActivationQuant) -> tuple[Array, Array, Array]:
  """`ops.rotated` with a fixed permutation of the channels, orthogonal like a rotation."""
  normed = x if gain is None else rms_norm(x, gain, epsilon)
  return _quantised(normed[..., _order(x.shape[-1])], kind)


def spared(x: Array, gain: Array | None, epsilon: float,
           kind: cfg.ActivationQuant) -> tuple[Array, Array, Array]:
  """`plain`, whatever the model's quantiser, at int8: W_o and W_down are spared."""
  del kind
  return plain(x, gain, epsilon, 'int8')


INPUTS: dict[str, ops.Rotated] = {
    'none': plain, 'hadamard': ops.rotated, 'permutation': permuted, 'spared': spared}


# --- Models -------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
  """A model that is trained from its first step.

  inputs: what W_o and W_down read, a key of INPUTS.
  planted: whether some channels of each SubLN start with a large gain.
  length: its steps, over those that the command asks for.
  """

  quant: cfg.Quant
  inputs: str = 'none'
  planted: bool = False
  peak_rate: float = RATE
  length: float = 1.0


def _ternary(activations: cfg.ActivationQuant) -> cfg.Quant:
  # The rotated input is an operation of the model, which `build` puts in.
  return cfg.Quant('ternary', activations, hadamard=True)


# The models of the experiment, and their branches at the switch: (activations, inputs).
SETTINGS: dict[str, Setting] = {
    'A8': Setting(_ternary('int8')),
    'A8 + Hadamard': Setting(_ternary('int8'), 'hadamard'),
    # What planted outliers do shows soon; whether a rotated model catches up, late.
    'planted: A8': Setting(_ternary('int8'), planted=True, length=0.5),
    'planted: A8 + Hadamard': Setting(_ternary('int8'), 'hadamard', planted=True, length=0.5),
    'longer: A8': Setting(_ternary('int8'), length=2.0),
    'longer: A8 + Hadamard': Setting(_ternary('int8'), 'hadamard', length=2.0),
    'full precision': Setting(cfg.Quant(), peak_rate=4e-3),
    'A4 from the start': Setting(_ternary('int4')),
    'A4 + Hadamard from the start': Setting(_ternary('int4'), 'hadamard'),
    # Whether the rotated model is the slower one at its own best rate too.
    **{f'A8, rate {rate}': Setting(_ternary('int8'), peak_rate=rate) for rate in RATES},
    **{f'A8 + Hadamard, rate {rate}': Setting(_ternary('int8'), 'hadamard', peak_rate=rate)
       for rate in RATES},
}
BRANCHES: dict[str, dict[str, tuple[cfg.ActivationQuant, str]]] = {
    'A8': {'A8': ('int8', 'none'), 'A4': ('int4', 'none'), 'A4 absmax': ('int4_absmax', 'none'),
           'A4 but W_o, W_down': ('int4', 'spared')},
    'A8 + Hadamard': {'A8': ('int8', 'hadamard'), 'A4': ('int4', 'hadamard'),
                      'A4 absmax': ('int4_absmax', 'hadamard')},
    'planted: A8': {'A8': ('int8', 'none'), 'A4': ('int4', 'none'),
                    'A4 absmax': ('int4_absmax', 'none'),
                    'A4 + permutation': ('int4', 'permutation')},
    'planted: A8 + Hadamard': {'A8': ('int8', 'hadamard'), 'A4': ('int4', 'hadamard')},
    'longer: A8': {'A8': ('int8', 'none'), 'A4': ('int4', 'none')},
    'longer: A8 + Hadamard': {'A8': ('int8', 'hadamard'), 'A4': ('int4', 'hadamard')},
}


@functools.cache
def build(quant: cfg.Quant, inputs: str) -> Model:
  """The shape of the paper's models, small: SwiGLU, SubLN, untied head, as many key as query
  heads."""
  config = cfg.Model(num_layers=LAYERS, d_model=WIDTH, d_ff=FF, num_heads=4, num_kv_heads=4,
                     head_dim=WIDTH // 4, vocab_size=VOCAB, sub_norm=True, tied_head=False,
                     quant=quant)
  compute = cfg.Compute(unroll=0)
  return transformer.build(config, compute, ops=ops.Ops()._replace(rotated=INPUTS[inputs]))


def new_params(setting: Setting, seed: int) -> Params:
  """Parameters of a seed; planted channels are the same ones in every layer."""
  params = P.init(build(setting.quant, setting.inputs).specs, jax.random.key(seed))
  if setting.planted:
    for name in ('attn_sub_norm', 'ffn_sub_norm'):
      gain = params['layers'][name]
      every = round(1 / PLANTED_SHARE)
      params['layers'][name] = gain.at[:, every // 2::every].set(PLANTED)
  return params


def with_permuted_rows(state: TrainState) -> TrainState:
  """The state whose W_o and W_down, with their moments, take `permuted` inputs as before."""
  def leaf(path: tuple[Any, ...], x: Array) -> Array:
    names = {str(getattr(key, 'key', '')) for key in path}
    return x[:, _order(x.shape[1])] if names & {'wo', 'w_down'} else x

  return jax.tree_util.tree_map_with_path(leaf, state)


# --- Data ---------------------------------------------------------------------------


class Text(NamedTuple):
  """WikiText-2, packed; `apart` says in words what was found not to be shared."""

  packed: loader.Prepared
  apart: list[str]


def open_text(data: Path, cache: Path) -> Text:
  """Opens WikiText-2, whose articles and long paragraphs must be on one side alone."""
  document = r'^ = [^=].* = $'
  train, held_out = (cfg.TextFiles(str(data / name), document)
                     for name in ('train.txt.gz', 'valid.txt'))
  packed = loader.prepare(cfg.Data(train, cfg.TrainedBPE(VOCAB), LENGTH,
                                   validation_glob=str(data / 'valid.txt')), cache)

  def paragraphs(source: cfg.TextFiles) -> Iterator[str]:
    for text in sources.documents(source):
      yield from (line for line in text.splitlines() if len(line) >= 80)

  apart = [splits.refuse_overlap(sources.documents(train), sources.documents(held_out),
                                 'articles'),
           splits.refuse_overlap(paragraphs(train), paragraphs(held_out), 'paragraphs')]
  return Text(packed, [str(found) for found in apart])


# --- Training -----------------------------------------------------------------------


def optimizer_of(setting: Setting, num_steps: int) -> cfg.AdamW:
  """The paper's recipe: two stages of the rate with the 7B model's ratio, weight decay 0.1 → 0.

  Departs from the paper in ending at a tenth of the peak: with so few steps at 4 bits nothing would
  move at the end of a decay to 0.
  """
  peak = setting.peak_rate
  return cfg.AdamW(cfg.TwoStage(peak, 0.6 * peak, end_rate=0.1 * peak,
                                warmup_steps=num_steps // 20))


@functools.cache
def _compiled(quant: cfg.Quant, inputs: str, optimizer: cfg.AdamW, num_steps: int
              ) -> tuple[Any, Any]:
  """The jitted step and the optimiser of a model; its state is not donated, as branches share
  it."""
  model = build(quant, inputs)
  transformation = optim.make_optimizer(optimizer, num_steps, model.specs)
  rate = optim.learning_rate(optimizer.schedule, num_steps)
  loss = losses.next_token(model, 0)
  take = step.make_train_step(model.specs, loss, transformation, rate)
  return jax.jit(take), transformation


@functools.cache
def _evaluation(quant: cfg.Quant, inputs: str) -> Callable[[Params, Batch], dict]:
  return jax.jit(losses.evaluation(build(quant, inputs), 0))


def held_out_loss(quant: cfg.Quant, inputs: str, params: Params, text: Text) -> float:
  """Nats per token over the start of the validation text."""
  evaluate, total, count = _evaluation(quant, inputs), 0.0, 0.0
  for batch in loader.eval_batches(text.packed.validation, BATCH, EVAL_BATCHES):
    value = evaluate(params, batch)['loss']
    total, count = total + float(value.sum), count + float(value.count)
  return total / count


def train(name: str, seed: int, num_steps: int, text: Text) -> dict[str, Any]:
  """Trains a setting and its branches.

  Args:
    name: a key of SETTINGS.
    seed: of the parameters and of the order of the data.
    num_steps: steps of the whole run.
    text: the data.

  Returns:
    A row: the losses of the branches at the switch, before any step at their quantiser, and at the
    end; the training curve; the statistics of the inputs of W_o and W_down at the switch.
  """
  setting = SETTINGS[name]
  optimizer = optimizer_of(setting, num_steps)
  compiled = functools.partial(_compiled, optimizer=optimizer, num_steps=num_steps)
  take, transformation = compiled(setting.quant, setting.inputs)
  params = new_params(setting, seed)
  state = TrainState(jnp.zeros((), jnp.int32), params, transformation.init(params), {})
  batches = loader.train_iterator(text.packed.train, seed=seed, batch_size=BATCH)
  curve, rest = [], []
  switch = round(SWITCH * num_steps)
  for i in range(num_steps):
    if i >= switch:
      rest.append(next(batches))
      continue
    state, values = take(state, next(batches))
    curve.append(values['loss'].sum / values['loss'].count)
  batches.close()
  row: dict[str, Any] = {'setting': name, 'seed': seed, 'steps': num_steps, 'at_switch': {},
                         'at_end': {}}
  own = {'': (setting.quant.activations, setting.inputs)}
  for branch, (kind, inputs) in BRANCHES.get(name, own).items():
    quant = dataclasses.replace(setting.quant, activations=kind)
    branched = with_permuted_rows(state) if inputs == 'permutation' else state
    row['at_switch'][branch] = held_out_loss(quant, inputs, branched.params, text)
    take, _ = compiled(quant, inputs)
    for batch in rest:
      branched, _ = take(branched, batch)
    row['at_end'][branch] = held_out_loss(quant, inputs, branched.params, text)
  row['curve'] = [round(float(v), 4) for v in curve[::10]]
  if name in BRANCHES:
    row['inputs'] = statistics(setting, state.params, text)
  return row


# --- Statistics of activations ------------------------------------------------------


def _shape_of(x: Array) -> dict[str, Array]:
  """Kurtosis, clipped share and signal-to-noise ratio of rows, means over all of them.

  kurtosis: E[(x − E x)⁴] / E[(x − E x)²]² over the channels of a token; 3 for Gaussian ones.
  clipped: the share of entries that int4's absmean quantiser clips.
  decibel: 10 log₁₀(Σ x² / Σ (x − Q(x))²) of that quantiser.
  """
  centred = x - x.mean(-1, keepdims=True)
  variance = jnp.square(centred).mean(-1)
  codes, scale = q.activations(x, 'int4')
  noise = jnp.square(x - codes * scale).sum(-1)
  ideal = jnp.round(x / scale)
  return {'kurtosis': ((centred**4).mean(-1) / variance**2).mean(),
          'clipped': ((ideal > 7) | (ideal < -8)).mean(),
          'decibel': (10 * jnp.log10(jnp.square(x).sum(-1) / noise)).mean()}


def statistics(setting: Setting, params: Params, text: Text) -> dict[str, list]:
  """{'wo before', 'wo after', 'w_down before', …}: `_shape_of` in each layer, around the rotation.

  Before and after are those of the Hadamard rotation, which is applied here in both settings: where
  the model has none, 'after' is what it would have read with one.
  """
  batch = next(loader.eval_batches(text.packed.validation, 4 * BATCH, 1))
  rotate = INPUTS[setting.inputs]

  def measured(params: Params, batch: Batch) -> list[dict[str, Array]]:
    seen: list[dict[str, Array]] = []

    def recording(x: Array, gain: Array | None, epsilon: float,
                  kind: cfg.ActivationQuant) -> tuple[Array, Array, Array]:
      normed = x if gain is None else rms_norm(x, gain, epsilon)
      seen.append({'before': _shape_of(normed), 'after': _shape_of(reference.hadamard(normed))})
      return rotate(x, gain, epsilon, kind)

    config = build(setting.quant, setting.inputs).config
    model = transformer.build(config, ops=ops.Ops()._replace(rotated=recording))
    # Layers one by one instead of a scan, so that what each reads can be returned.
    model.apply(unstacked(params, LAYERS), batch.tokens, batch.positions, batch.segments)
    return seen

  seen = jax.device_get(jax.jit(measured)(params, batch))
  result: dict[str, list] = {}
  for place, layer in enumerate(seen):  # W_o and W_down take turns.
    for when, values in layer.items():
      row = {key: round(float(value), 5) for key, value in values.items()}
      result.setdefault(f'{("wo", "w_down")[place % 2]} {when}', []).append(row)
  return result
