"""Decode tokens/s on this CPU: jaxrl_pt, Hugging Face generate (torch) and Tunix's sampler.

    python experiments/sampler/decode.py --peer_python PATH

PATH is a Python interpreter that has google-tunix, torch and transformers. All sample (not
greedy) 256 tokens after prompts of 128 from random weights of the same Llama shape in
float32; a result counts every row's tokens over the whole call, prefill included. Each
contender is a child that compiles, warms up and then waits (PyTorch with as many threads as are
fastest); rounds of at least ROUND_SECONDS alternate between them, so that what else the machine
does meets all alike. Medians and all rounds go to results/decode.json.
"""

import argparse
from collections.abc import Callable
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

RESULT = Path(__file__).parent / 'results' / 'decode.json'
PROMPT, NEW = 128, 256
BATCHES = (1, 16, 64)
# A call at batch 1 takes 0.1 s: too short a look at a machine whose speed wanders.
ROUND_SECONDS = 2.0


class Shape(NamedTuple):
  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  vocab_size: int


SHAPES = {'2.8M': Shape(6, 192, 512, 6, 2, 32, 1024),
          '15.7M': Shape(8, 384, 1024, 6, 2, 64, 4096)}

# run() samples a batch and waits for it
Run = Callable[[], None]


def prompt_ids(shape: Shape, rows: int) -> Any:
  import numpy as np
  return np.random.default_rng(0).integers(3, shape.vocab_size, (rows, PROMPT)).astype(np.int32)


# --- Contenders -----------------------------------------------------------------------


def jaxrl_pt(shape: Shape, rows: int) -> Run:
  import functools

  import jax
  import jax.numpy as jnp

  from jaxrl_pt import config as cfg
  from jaxrl_pt import params as P
  from jaxrl_pt.models import transformer
  from jaxrl_pt.sampling import groups
  from jaxrl_pt.types import Prompts

  model = transformer.build(cfg.Model(*shape))
  params = jax.jit(lambda key: P.init(model.specs, key))(jax.random.key(0))
  prompts = Prompts(jnp.asarray(prompt_ids(shape, rows)), jnp.full(rows, PROMPT),
                    jnp.arange(rows))
  generate = jax.jit(functools.partial(groups.generate, model, sampler=cfg.Sampler(),
                                       num_samples=1, num_tokens=NEW))
  return lambda: generate(params, prompts, jax.random.key(0)).tokens.block_until_ready()


def hugging_face(shape: Shape, rows: int) -> Run:
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.LlamaConfig(
      vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=shape.d_ff,
      num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
      num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim,
      tie_word_embeddings=True, max_position_embeddings=1024)
  model = transformers.LlamaForCausalLM(config).eval()
  ids = torch.from_numpy(prompt_ids(shape, rows)).long()

  def run() -> None:
    with torch.inference_mode():
      out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                           max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=None,
                           pad_token_id=0)
    assert out.shape == (rows, PROMPT + NEW)

  def seconds(num_threads: int) -> float:
    torch.set_num_threads(num_threads)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

  # Small products may run faster in one thread than in as many as there are cores.
  torch.set_num_threads(min((os.cpu_count() or 1, 1), key=seconds))
  return run


def tunix(shape: Shape, rows: int) -> Run:
  from flax import nnx
  import jax
  from tunix.generate import sampler as samplers
  from tunix.models.llama3 import model as llama3

  config = llama3.ModelConfig(
      num_layers=shape.num_layers, vocab_size=shape.vocab_size, embed_dim=shape.d_model,
      hidden_dim=shape.d_ff, num_heads=shape.num_heads, head_dim=shape.head_dim,
      num_kv_heads=shape.num_kv_heads, rope_theta=10_000, norm_eps=1e-5, weight_tying=True)
  mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with mesh:
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
  ids = prompt_ids(shape, rows)

  class Tokens:
    """A tokenizer for which a prompt is the number of its row."""

    def encode(self, text: str) -> list[int]:
      return ids[int(text), 1:].tolist()  # The sampler puts a BOS before it.

    def decode(self, tokens: Any) -> str:
      return str(len(tokens))

    bos_id, eos_id, pad_id = (lambda self: 1), (lambda self: -1), (lambda self: 0)

    def dedup_bos_ids(self, tokens: list[int]) -> list[int]:
      return tokens

  with mesh:
    sampler = samplers.Sampler(model, Tokens(), samplers.CacheConfig(
        cache_size=PROMPT + NEW + 1, num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim))

  def run() -> None:
    with mesh:
      out = sampler([str(i) for i in range(rows)], max_generation_steps=NEW,
                    max_prompt_length=PROMPT, temperature=1.0, top_p=1.0, seed=0,
                    eos_tokens=[shape.vocab_size + 7])
    assert len(out.tokens) == rows and min(map(len, out.tokens)) >= NEW - 1

  return run


CONTENDERS = {'jaxrl_pt': jaxrl_pt, 'hugging_face': hugging_face, 'tunix': tunix}


def serve(name: str, shape: str, rows: int) -> None:
  """The child: one round for each line on standard input."""
  run = CONTENDERS[name](SHAPES[shape], rows)
  run()
  print('ready', flush=True)
  for _ in sys.stdin:
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < ROUND_SECONDS:
      run()
      calls += 1
    print(calls * rows * NEW / (time.perf_counter() - start), flush=True)


# --- Rounds -----------------------------------------------------------------------------


def cell(shape: str, rows: int, rounds: int, peer_python: str) -> dict[str, Any]:
  pythons = {name: sys.executable if name == 'jaxrl_pt' else peer_python for name in CONTENDERS}
  children = {name: subprocess.Popen(
      [python, __file__, '--child', name, shape, str(rows)], stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
      for name, python in pythons.items()}

  def line(name: str) -> str:
    for text in children[name].stdout:
      if text.startswith('ready') or text[0].isdigit():
        return text
    raise SystemExit(f'{name} ended early: run it alone with --child {name} {shape} {rows}')

  for name in children:
    line(name)
  speeds: dict[str, list[float]] = {name: [] for name in children}
  for _ in range(rounds):
    for name, child in children.items():
      child.stdin.write('go\n')
      child.stdin.flush()
      speeds[name].append(float(line(name)))
  for child in children.values():
    child.stdin.close()
    child.wait()
  medians = {name: statistics.median(values) for name, values in speeds.items()}
  best = max(medians[name] for name in medians if name != 'jaxrl_pt')
  return {'shape': shape, 'batch': rows, 'tokens_per_second': medians, 'rounds': speeds,
          'over_the_better': medians['jaxrl_pt'] / best}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--peer_python', default=sys.executable)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--only', metavar='SHAPE:BATCH', help='one cell, e.g. 2.8M:1; the others '
                      'of the results stay')
  parser.add_argument('--child', nargs=3, metavar=('NAME', 'SHAPE', 'BATCH'))
  args = parser.parse_args()
  if args.child:
    return serve(args.child[0], args.child[1], int(args.child[2]))
  cells = []
  if args.only:
    cells = [c for c in json.loads(RESULT.read_text())['cells']
             if f'{c["shape"]}:{c["batch"]}' != args.only]
  for shape in SHAPES:
    for rows in BATCHES:
      if args.only not in (None, f'{shape}:{rows}'):
        continue
      cells.append(cell(shape, rows, args.rounds, args.peer_python))
      row = cells[-1]
      print(f'{shape} batch {rows}: ' + '  '.join(
          f'{n} {v:,.0f}' for n, v in row['tokens_per_second'].items())
          + f'  → {row["over_the_better"]:.2f}×', flush=True)
  cells.sort(key=lambda c: (float(c['shape'].rstrip('M')), c['batch']))
  RESULT.write_text(json.dumps({'prompt': PROMPT, 'new': NEW, 'cells': cells}, indent=1) + '\n')


if __name__ == '__main__':
  main()
