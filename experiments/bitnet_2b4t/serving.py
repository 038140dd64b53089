"""Memory and tokens/s of the 2B4T shape on this CPU, beside `transformers`' packed BitLinear.

    python experiments/bitnet_2b4t/serving.py --batch 1
    python experiments/bitnet_2b4t/serving.py --batch 8

Both contenders have the same random ternary weights, which are drawn packed, one matrix after the
other: the float masters of 2.4 billion parameters never exist. Ours has its codes four to a byte,
embedding and head in 8 bits, and float32 activations between its integer products (a CPU without
bfloat16 instructions is slower in that). `transformers` has its own packed class, `BitLinear`,
which unpacks a weight each time it is used, and the faster of float32 and bfloat16 for all else;
PyTorch has as many threads as are fastest. A third contender is `transformers` with the same
weights unpacked to floats once, many times the memory, and without quantised activations. Each is
a child that warms up and then waits; rounds alternate. A round decodes NEW tokens greedily after
PROMPT tokens, and counts the time of the whole call. Results go to results/serving_BATCH.json.
"""

import argparse
from collections.abc import Callable, Iterator
import functools
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / 'results'
PROMPT, NEW, LAYERS, WIDTH, FF, VOCAB = 16, 8, 30, 2560, 6912, 128_256
MOST_ROUNDS, SECONDS = 5, 300  # No round begins after so many seconds.
HEADS, KV_HEADS, HEAD_DIM = 20, 5, 128
# Outputs and inputs of the matrices of a layer.
MATRICES = {'wq': (2560, WIDTH), 'wk': (640, WIDTH), 'wv': (640, WIDTH), 'wo': (WIDTH, 2560),
            'w_gate': (FF, WIDTH), 'w_up': (FF, WIDTH), 'w_down': (WIDTH, FF)}
ROWS_AT_ONCE = VOCAB // 16

Run = Callable[[], None]


def codes_plus_1(layer: int, name: str) -> np.ndarray:
  """u8[O, I] in {0, 1, 2}."""
  draw = np.random.default_rng([layer, list(MATRICES).index(name)])
  return draw.integers(0, 3, MATRICES[name], np.uint8)


def scale(name: str) -> float:
  """Keeps activations near 1: two thirds of the codes are not 0."""
  return (1.5 / MATRICES[name][1]) ** 0.5


def embedding() -> Iterator[np.ndarray]:
  """f32 rows of the embedding, some at a time."""
  for part in range(VOCAB // ROWS_AT_ONCE):
    draw = np.random.default_rng([99, part])
    yield draw.standard_normal((ROWS_AT_ONCE, WIDTH), np.float32) * 0.02


def prompt_ids(rows: int) -> np.ndarray:
  return np.random.default_rng(5).integers(0, VOCAB, (rows, PROMPT))


def resident() -> int:
  """Bytes of this process in memory."""
  with open('/proc/self/statm', encoding='ascii') as file:
    return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


# --- Contenders -----------------------------------------------------------------------


def jaxrl_pt(rows: int, report: dict[str, Any]) -> Run:
  import jax
  import jax.numpy as jnp

  from jaxrl_pt import config as cfg
  from jaxrl_pt.models import transformer
  from jaxrl_pt.nn.packed import QuantizedTable, TernaryBytes, to_table
  from jaxrl_pt.sampling import groups
  from jaxrl_pt.types import Prompts

  config = cfg.Model(LAYERS, WIDTH, FF, HEADS, KV_HEADS, HEAD_DIM, VOCAB, rope_theta=500_000.0,
                     activation='relu2', sub_norm=True, quant=cfg.Quant('ternary', 'int8'))
  model = transformer.build(config)
  report['resident_before_weights'] = resident()

  def matrix(name: str) -> TernaryBytes:
    num_out, num_in = MATRICES[name]
    held = np.empty((LAYERS, num_out, num_in // 4), np.uint8)
    for layer in range(LAYERS):
      planes = np.split(codes_plus_1(layer, name), 4, 1)
      held[layer] = planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6
    return TernaryBytes(jnp.asarray(held), jnp.full((LAYERS, 1, 1), scale(name)))

  layers: dict[str, Any] = {name: matrix(name) for name in MATRICES}
  for name, width in (('attn_norm', WIDTH), ('ffn_norm', WIDTH), ('attn_sub_norm', 2560),
                      ('ffn_sub_norm', FF)):
    layers[name] = jnp.ones((LAYERS, width))
  parts = [to_table(jnp.asarray(part), 8) for part in embedding()]
  table = QuantizedTable(jnp.concatenate([p.codes for p in parts]),
                         jnp.concatenate([p.scale for p in parts]), 8)
  del parts
  params = {'embed': table, 'layers': layers, 'final_norm': jnp.ones(WIDTH)}
  num_bytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  report['body_bytes'] = num_bytes(params['layers'])
  report['embedding_and_head_bytes'] = num_bytes(params['embed'])
  report['live_array_bytes'] = num_bytes(jax.live_arrays())
  report['resident_with_weights'] = resident()
  prompts = Prompts(jnp.asarray(prompt_ids(rows), jnp.int32), jnp.full(rows, PROMPT),
                    jnp.arange(rows))
  generate = jax.jit(functools.partial(
      groups.generate, model, sampler=cfg.Sampler(0.0), num_samples=1, num_tokens=NEW))

  def run() -> None:
    report['tokens'] = generate(params, prompts, jax.random.key(0)).tokens[:, 0].tolist()

  return run


def of_transformers(packed: bool, rows: int, report: dict[str, Any]) -> Run:
  import torch
  import transformers
  from transformers.integrations import bitnet
  from transformers.models.bitnet import modeling_bitnet

  # It compiles for each kind of float and of matrix, which are more than PyTorch's default.
  torch._dynamo.config.recompile_limit = 256
  report['resident_before_weights'] = resident()
  theirs = {'wq': 'self_attn.q_proj', 'wk': 'self_attn.k_proj', 'wv': 'self_attn.v_proj',
            'wo': 'self_attn.o_proj', 'w_gate': 'mlp.gate_proj', 'w_up': 'mlp.up_proj',
            'w_down': 'mlp.down_proj'}
  config = transformers.BitNetConfig(
      vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=FF, num_hidden_layers=LAYERS,
      num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, hidden_act='relu2',
      max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=True,
      rope_parameters={'rope_type': 'default', 'rope_theta': 500_000.0})

  def unpacked(codes: np.ndarray, name: str, dtype: Any) -> Any:
    with torch.device('meta'):
      linear = torch.nn.Linear(codes.shape[1], codes.shape[0], False)
    weight = (torch.from_numpy(codes).to(dtype) - 1) * scale(name)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear

  def still_packed(codes: np.ndarray, name: str, dtype: Any) -> Any:
    linear = bitnet.BitLinear(codes.shape[1], codes.shape[0], False, dtype=dtype)
    planes = np.split(codes, 4, 0)
    linear.weight.copy_(torch.from_numpy(
        planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6))
    linear.weight_scale.fill_(1 / scale(name))  # This class divides by it.
    return linear

  to_linear = still_packed if packed else unpacked

  def build(dtype: Any) -> Any:
    with torch.device('meta'):
      model = transformers.BitNetForCausalLM(config).to(dtype)
    for layer in range(LAYERS):
      for name, path in theirs.items():
        linear = to_linear(codes_plus_1(layer, name), name, dtype)
        model.model.layers[layer].set_submodule(path, linear)
    table = torch.empty(VOCAB, WIDTH, dtype=dtype)
    for part, values in enumerate(embedding()):
      table[part * ROWS_AT_ONCE:(part + 1) * ROWS_AT_ONCE] = torch.from_numpy(values)
    model.model.embed_tokens.weight = torch.nn.Parameter(table, requires_grad=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    for module in model.modules():
      if isinstance(module, modeling_bitnet.BitNetRMSNorm):
        module.weight = torch.nn.Parameter(torch.ones(module.weight.shape, dtype=dtype), False)
    model.model.rotary_emb = modeling_bitnet.BitNetRotaryEmbedding(config)
    return model.eval()

  ids = torch.from_numpy(prompt_ids(rows)).long()

  def run(model: Any, new: int = NEW) -> None:
    with torch.inference_mode():
      out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           max_new_tokens=new, min_new_tokens=new, eos_token_id=None,
                           pad_token_id=0)
    report['tokens'] = out[:, PROMPT:].tolist()

  def seconds(model: Any, threads: int) -> float:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    run(model, 2)
    return time.perf_counter() - start

  trials = {}
  for dtype in (torch.float32, torch.bfloat16):
    model = build(dtype)
    report[f'resident_with_weights, {dtype}'] = resident()
    run(model, 2)  # Compiles.
    for threads in {1, os.cpu_count() or 1}:
      trials[dtype, threads] = seconds(model, threads)
    del model  # Both at once would be 14 GB.
  report['trials_seconds'] = {f'{d}, {t} threads': s for (d, t), s in trials.items()}
  dtype, threads = min(trials, key=trials.__getitem__)
  report['chosen'] = f'{dtype}, {threads} threads'
  model = build(dtype)
  torch.set_num_threads(threads)
  return lambda: run(model)


CONTENDERS = {'jaxrl_pt': jaxrl_pt, 'transformers': functools.partial(of_transformers, True),
              'transformers, unpacked': functools.partial(of_transformers, False)}


def serve(name: str, rows: int) -> None:
  """The child: one round for each line on standard input."""
  report: dict[str, Any] = {}
  start = time.perf_counter()
  run = CONTENDERS[name](rows, report)
  run()
  report |= {'seconds_to_be_ready': time.perf_counter() - start, 'resident_after_run': resident()}
  print('ready', flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    run()
    print(rows * NEW / (time.perf_counter() - start), flush=True)
  print('report ' + json.dumps(report), flush=True)


# --- Rounds -----------------------------------------------------------------------------


def measure(rows: int) -> dict[str, Any]:
  children = {}

  def line(name: str) -> str:
    for text in children[name].stdout:
      if text.startswith(('ready', 'report')) or text[0].isdigit():
        return str(text)
    raise SystemExit(f'{name} ended early: run it alone with --child {name}')

  for name in CONTENDERS:  # One after the other, so that none compiles beside another.
    children[name] = subprocess.Popen(
        [sys.executable, __file__, '--child', name, '--batch', str(rows)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    line(name)
  began = time.perf_counter()
  speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
  for number in range(MOST_ROUNDS):
    if number and time.perf_counter() - began > SECONDS:
      break
    for name, child in children.items():
      child.stdin.write('go\n')
      child.stdin.flush()
      speeds[name].append(float(line(name)))
  reports = {}
  for name, child in children.items():
    child.stdin.close()
    reports[name] = json.loads(line(name).removeprefix('report '))
    child.wait()
  tokens = [reports[name].pop('tokens') for name in CONTENDERS]
  ours, *others = CONTENDERS
  ratios = {name: [a / b for a, b in zip(speeds[ours], speeds[name], strict=True)]
            for name in others}
  return {'batch': rows, 'prompt': PROMPT, 'new': NEW, 'tokens_per_second': speeds,
          'medians': {n: statistics.median(v) for n, v in speeds.items()},
          'ratio_of_each_round': ratios,
          'ratio': {name: statistics.median(values) for name, values in ratios.items()},
          'first_tokens_equal': [a[0] == b[0] for a, b in zip(*tokens[:2], strict=True)],
          'reports': reports}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--child', choices=CONTENDERS)
  args = parser.parse_args()
  if args.child:
    return serve(args.child, args.batch)
  row = measure(args.batch)
  print(json.dumps(row, indent=1))
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / f'serving_{args.batch}.json').write_text(json.dumps(row, indent=1) + '\n')


if __name__ == '__main__':
  main()
