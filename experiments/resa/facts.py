"""Real text with planted facts, and a tiny model trained on it: what `quality.py` decodes.

Bytes of books, into which facts such as "[kq=hzmwpxtv]" are planted; some are planted
again further on, and there the value can be read off the context. Trained with the product's own
step: first on short sequences, then on ones of the full length. The induction circuit that
reads a value off the context takes longer to form than there is time for here: `warm_start`
lays it out in two layers before training, which is what a bigger run would have learned.
"""

import functools
from pathlib import Path
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.train import losses, optim
from jaxrl_pt.train.step import make_train_step
from jaxrl_pt.types import Batch, TrainState

MODEL = cfg.Model(num_layers=3, d_model=96, d_ff=256, num_heads=8, num_kv_heads=2, head_dim=32,
                  vocab_size=256, rope_theta=1e7, tied_head=False)
# Rows, bytes of a row, bytes between facts, steps: the first stage tunes the induction heads.
STAGES = ((16, 256, 8, 100), (4, 1024, 24, 30), (2, 2560, 48, 15), (1, 5120, 48, 25))
RECALL_WEIGHT = 4.0  # of the letters that the context tells
VALUE_LETTERS = 8
LETTERS = np.frombuffer(b'abcdefghijklmnopqrstuvwxyz', np.uint8)


def books(folder: Path) -> list[bytes]:
  """The books' own text, without the collection's header and footer."""
  texts = []
  for path in sorted(folder.glob('*.txt')):
    text = path.read_text(encoding='utf-8')
    inside = re.split(r'\*\*\* (?:START|END) OF TH[^\n]*', text)
    body = inside[1] if len(inside) > 2 else text
    texts.append(re.sub(r'\s+', ' ', body).encode('ascii', 'ignore'))
  return texts


def plant(text: bytes, length: int, rng: np.random.Generator, gap: int,
          first_recall: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """`length` bytes of text with facts planted about every `gap` bytes.

  Returns:
    u8[length] bytes, and bool[length], True on the value of a fact planted before.
  """
  start = int(rng.integers(0, len(text) - length))
  out, told, facts = bytearray(), [], {}
  while len(out) < length:
    size = 1 + int(rng.exponential(gap))
    out += text[start:start + size]
    told += [False] * size
    start += size
    known = list(facts)
    if known and (len(out) >= first_recall) and rng.random() < 0.6:
      key = known[int(rng.integers(len(known)))]
    else:
      key = rng.choice(LETTERS, 2).tobytes()
    again = key in facts
    facts.setdefault(key, rng.choice(LETTERS, VALUE_LETTERS).tobytes())
    out += b'[' + key + b'=' + facts[key] + b']'
    told += [False] * 4 + [again] * VALUE_LETTERS + [False]
  return np.frombuffer(bytes(out[:length]), np.uint8), np.array(told[:length])


def make_batch(texts: list[bytes], rows: int, length: int, seed: int, gap: int) -> Batch:
  """Rows of `length` predicted bytes."""
  rng = np.random.default_rng(seed)
  planted = [plant(texts[int(rng.integers(len(texts)))], length + 1, rng, gap)
             for _ in range(rows)]
  tokens = np.stack([t for t, _ in planted]).astype(np.int32)
  told = np.stack([t for _, t in planted])[:, 1:]
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
  return Batch(tokens[:, :-1], tokens[:, 1:], positions, np.ones_like(positions),
               np.where(told, RECALL_WEIGHT, 1.0).astype(np.float32),
               np.arange(rows, dtype=np.int32))


def warm_start(params: dict) -> dict:
  """Layer 0 looks at the token before; layer 1 at tokens whose predecessor is the present one.

  Of the residual stream, number 0 is a constant, and three parts hold the token's name, the
  name of the token before, and the name that the context suggests. Matches go through the
  slow half of RoPE's pairs, so that they survive thousands of positions.
  """
  rng, names = np.random.default_rng(0), 31
  p = jax.tree.map(np.array, params)
  layers, width, half = p['layers'], MODEL.head_dim, MODEL.head_dim // 2
  own, before, told = slice(1, 32), slice(32, 63), slice(64, 95)
  for name in ('wo', 'w_down'):
    layers[name] *= 0.3
  p['embed'][:] = 0
  words = rng.normal(size=(256, names))
  words *= names**0.5 / np.linalg.norm(words, axis=1, keepdims=True)
  p['embed'][:, 0], p['embed'][:, own] = 0.15, 0.15 * words
  p['head'] *= 0.1
  p['head'][told] = p['embed'][:, own].T
  angles = MODEL.rope_theta ** (-np.arange(half) / half)
  fast = 1.0 * (np.arange(half) < half // 2)
  layers['wq'][0, :, :width] = 0
  layers['wq'][0, 0, :width] = 8 * np.concatenate([fast * np.cos(angles), -fast * np.sin(angles)])
  layers['wk'][0, :, :width], layers['wv'][0, :, :width] = 0, 0
  layers['wk'][0, 0, :width] = 8 * np.concatenate([fast, np.zeros(half)])
  layers['wv'][0, own, :names] = np.eye(names)
  layers['wo'][0, :names, before] = 0.087 * np.eye(names)
  slow = np.r_[half // 2:half, half + half // 2:width]
  match = 0.6 * rng.normal(size=(names, len(slow)))
  layers['wk'][1, :, :width], layers['wv'][1, :, :width] = 0, 0
  layers['wk'][1, before, slow] = match.T
  layers['wv'][1, own, :names] = np.eye(names)
  for head in range(2):
    layers['wq'][1, :, head * width:(head + 1) * width] = 0
    layers['wq'][1, own, head * width + slow] = match.T
    layers['wo'][1, head * width:head * width + names, told] = 0.15 * np.eye(names)
  return jax.tree.map(jnp.asarray, p)


def train(texts: list[bytes]) -> tuple[dict, list[list[float]]]:
  """Parameters, and [step, loss, accuracy on recalled letters] now and then."""
  model = transformer.build(MODEL)
  num_steps = sum(steps for *_, steps in STAGES)
  optimizer_config = cfg.AdamW(cfg.Cosine(2e-3, warmup_steps=20), weight_decay=0.01)
  optimizer = optim.make_optimizer(optimizer_config, num_steps, model.specs)
  step = jax.jit(make_train_step(
      model.specs, losses.next_token(model, 0), optimizer,
      optim.learning_rate(optimizer_config.schedule, num_steps)), donate_argnums=0)
  evaluate = jax.jit(functools.partial(recall_accuracy, model))
  params = warm_start(P.init(model.specs, jax.random.key(0)))
  state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), {})
  curve, number, began = [], 0, time.perf_counter()
  for rows, length, gap, steps in STAGES:
    for _ in range(steps):
      batch = make_batch(texts, rows, length, number, gap)
      state, metrics = step(state, batch)
      number += 1
      if number % 20 == 0 or number == num_steps:
        accuracy = float(evaluate(state.params, batch))
        curve.append([number, float(metrics['loss'].mean()), accuracy])
        print(f'step {number} length {length} loss {curve[-1][1]:.3f} recall {accuracy:.3f} '
              f'{time.perf_counter() - began:.0f} s', flush=True)
  return state.params, curve


def recall_accuracy(model, params: dict, batch: Batch) -> jax.Array:
  """Share of the recalled letters that are the likeliest token."""
  hidden = model.apply(params, batch.tokens, batch.positions, batch.segments)
  right = (hidden @ model.head(params)).argmax(-1) == batch.targets
  told = batch.weights > 1
  return (right & told).sum() / jnp.maximum(told.sum(), 1)


def save(path: Path, params: dict) -> None:
  """Flat arrays in an .npz, without pickling."""
  flat = {jax.tree_util.keystr(k, simple=True, separator='/'): np.asarray(x)
          for k, x in jax.tree_util.tree_leaves_with_path(params)}
  np.savez(path, **flat)


def load(path: Path) -> dict:
  """What `save` wrote, in the shape of the model's specs."""
  flat = np.load(path, allow_pickle=False)
  specs = transformer.build(MODEL).specs
  return jax.tree_util.tree_map_with_path(
      lambda k, _: jnp.asarray(flat[jax.tree_util.keystr(k, simple=True, separator='/')]), specs,
      is_leaf=P.is_spec)
