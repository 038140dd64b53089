"""Training tokens/s on this CPU: jaxrl_pt, Tunix's trainer and a plain PyTorch model.

    python experiments/foundation/throughput.py --peer_python PATH

PATH is a Python interpreter that has google-tunix and torch (they need not stand beside
jaxrl_pt). All train the same dense float32 Llama shape on the same batch: forward,
backward, clip, AdamW. Each contender is a child process that compiles, warms up and then
waits; rounds of a few seconds alternate between them, so that what else the machine does
meets all alike. Every shape runs under the C library's default allocator and with its
large blocks on huge pages (GLIBC_TUNABLES=glibc.malloc.hugetlb=1, for all contenders).
Results, with the median of the rounds and their range, go to results/throughput.json.
"""

import argparse
from collections.abc import Callable
import json
import os
from pathlib import Path
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

RESULT = Path(__file__).parent / 'results' / 'throughput.json'
ALLOCATORS = {'default': {}, 'huge pages': {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}}
WARMUP_STEPS = 2
LEARNING_RATE, CLIP, DECAY, B1, B2 = 1e-3, 1.0, 0.1, 0.9, 0.95


class Shape(NamedTuple):
  """A dense SwiGLU decoder with a tied head, and its batch."""

  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  vocab_size: int
  seq_len: int
  batch_size: int


SHAPES = {'2.8M': Shape(6, 192, 512, 6, 2, 32, 1024, 256, 16),
          '15.7M': Shape(8, 384, 1024, 6, 2, 64, 4096, 512, 8)}

# run(n) takes n optimiser steps, waits for them and returns the last loss
Run = Callable[[int], float]


def tokens_of(shape: Shape) -> Any:
  """i32[B, T + 1], the same for every contender."""
  import numpy as np
  size = (shape.batch_size, shape.seq_len + 1)
  return np.random.default_rng(0).integers(0, shape.vocab_size, size).astype(np.int32)


def batch_of(shape: Shape) -> Any:
  """The tokens as one full Batch of jaxrl_pt, on the device."""
  import jax
  import numpy as np

  from jaxrl_pt.types import Batch
  tokens = tokens_of(shape)
  rows = tokens[:, :-1].shape
  return jax.device_put(Batch(
      tokens[:, :-1], tokens[:, 1:], np.broadcast_to(np.arange(rows[1], dtype=np.int32), rows),
      np.ones(rows, np.int32), np.ones(rows, np.float32), np.arange(rows[0], dtype=np.int32)))


# --- Contenders -------------------------------------------------------------------


def jaxrl_pt(shape: Shape, unroll: int) -> tuple[Run, dict[str, str]]:
  """The product's own train step."""
  import jax

  from jaxrl_pt import config as cfg
  from jaxrl_pt.models import transformer
  from jaxrl_pt.parallel.mesh import make_mesh
  from jaxrl_pt.train import losses, optim
  from jaxrl_pt.train.state import init_state
  from jaxrl_pt.train.step import make_train_step

  model = transformer.build(cfg.Model(*shape[:7]), cfg.Compute(unroll=unroll))
  adamw = cfg.AdamW(cfg.ConstantRate(LEARNING_RATE), B1, B2, weight_decay=DECAY, clip_norm=CLIP)
  optimizer = optim.make_optimizer(adamw, 1000, model.specs)
  state = init_state(model, optimizer, make_mesh(cfg.Mesh()), 0)
  step = jax.jit(make_train_step(model.specs, losses.next_token(model, 0), optimizer,
                                 optim.learning_rate(adamw.schedule, 1000)), donate_argnums=0)
  batch = batch_of(shape)

  def run(num_steps: int) -> float:
    nonlocal state
    for _ in range(num_steps):
      state, metrics = step(state, batch)
    jax.block_until_ready(state)
    return float(metrics['loss'].mean())

  return run, {'jax': jax.__version__}


def tunix(shape: Shape) -> tuple[Run, dict[str, str]]:
  """Tunix's PeftTrainer on its own Llama 3, all weights trained."""
  from importlib.metadata import version

  from flax import nnx
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax
  from tunix.models.llama3 import model as llama3
  from tunix.sft import peft_trainer

  config = llama3.ModelConfig(
      num_layers=shape.num_layers, vocab_size=shape.vocab_size, embed_dim=shape.d_model,
      hidden_dim=shape.d_ff, num_heads=shape.num_heads, head_dim=shape.head_dim,
      num_kv_heads=shape.num_kv_heads, rope_theta=10_000, norm_eps=1e-5, weight_tying=True)
  mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with mesh:
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
  optimizer = optax.chain(optax.clip_by_global_norm(CLIP),
                          optax.adamw(LEARNING_RATE, b1=B1, b2=B2, weight_decay=DECAY))
  trainer = peft_trainer.PeftTrainer(
      model, optimizer, peft_trainer.TrainingConfig(eval_every_n_steps=10**9))
  trainer.is_managed_externally = True  # train() may be called again
  causal = np.tril(np.ones((shape.seq_len, shape.seq_len), bool))
  rows = (shape.batch_size, shape.seq_len)
  trainer.with_gen_model_input_fn(lambda x: {
      'input_tokens': x.input_tokens,
      'input_mask': x.input_mask,
      'positions': jnp.broadcast_to(jnp.arange(shape.seq_len), rows),
      'attention_mask': jnp.broadcast_to(causal, (shape.batch_size, *causal.shape))})
  batch = peft_trainer.TrainingInput(jnp.asarray(tokens_of(shape)[:, :-1]),
                                     jnp.ones(rows, jnp.int32))
  losses: list[Any] = []
  buffer_metrics = trainer._buffer_metrics

  def keep_loss(*args: Any, **kwargs: Any) -> Any:
    losses.append(kwargs['loss'])
    return buffer_metrics(*args, **kwargs)

  trainer._buffer_metrics = keep_loss

  def run(num_steps: int) -> float:
    with mesh:
      trainer.train([batch] * num_steps)
    jax.block_until_ready(nnx.state(trainer.model))
    return float(losses[-1])

  return run, {'google-tunix': version('google-tunix'), 'jax': jax.__version__}


def pytorch(shape: Shape) -> tuple[Run, dict[str, str]]:
  """A plain eager model: fused attention, fused AdamW."""
  import torch
  from torch import nn
  from torch.nn import functional as F

  torch.manual_seed(0)
  queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
  frequency = 10_000.0 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
  angle = torch.arange(shape.seq_len)[:, None] * frequency
  cos, sin = angle.cos(), angle.sin()

  def rotate(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

  class Block(nn.Module):

    def __init__(self) -> None:
      super().__init__()
      linear = lambda rows, columns: nn.Linear(rows, columns, bias=False)
      self.attn_norm = nn.RMSNorm(shape.d_model, eps=1e-5)
      self.ffn_norm = nn.RMSNorm(shape.d_model, eps=1e-5)
      self.qkv = linear(shape.d_model, queries + 2 * keys)
      self.out = linear(queries, shape.d_model)
      self.gate_up = linear(shape.d_model, 2 * shape.d_ff)
      self.down = linear(shape.d_ff, shape.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
      heads = [t.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
               for t in self.qkv(self.attn_norm(x)).split([queries, keys, keys], -1)]
      attended = F.scaled_dot_product_attention(rotate(heads[0]), rotate(heads[1]), heads[2],
                                                is_causal=True, enable_gqa=True)
      x = x + self.out(attended.transpose(1, 2).flatten(2))
      gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, -1)
      return x + self.down(F.silu(gate) * up)

  embed = nn.Embedding(shape.vocab_size, shape.d_model)
  nn.init.normal_(embed.weight, std=0.02)
  blocks = nn.Sequential(*[Block() for _ in range(shape.num_layers)])
  model = nn.ModuleList([embed, blocks, nn.RMSNorm(shape.d_model, eps=1e-5)])
  optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (B1, B2),
                                weight_decay=DECAY, fused=True)
  tokens = torch.from_numpy(tokens_of(shape)).long()

  def run(num_steps: int) -> float:
    for _ in range(num_steps):
      optimizer.zero_grad(set_to_none=True)
      hidden = model[2](blocks(embed(tokens[:, :-1])))
      logits = F.linear(hidden, embed.weight).flatten(0, 1)
      loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
      loss.backward()
      nn.utils.clip_grad_norm_(model.parameters(), CLIP)
      optimizer.step()
    return float(loss.detach())

  return run, {'torch': torch.__version__, 'threads': str(torch.get_num_threads())}


CONTENDERS: dict[str, Callable[[Shape], tuple[Run, dict[str, str]]]] = {
    'jaxrl_pt': lambda shape: jaxrl_pt(shape, unroll=0),
    'jaxrl_pt, layers scanned': lambda shape: jaxrl_pt(shape, unroll=1),
    'Tunix': tunix,
    'PyTorch': pytorch,
}
PEERS = {'Tunix': 'tunix', 'PyTorch': 'torch'}


# --- Child processes --------------------------------------------------------------


def work(contender: str, shape: Shape) -> None:
  """A child: builds, warms up, says so, then answers each line '<steps>' with a time."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what libraries print must not mix with the answers

  def answer(**row: Any) -> None:
    print(json.dumps(row), file=answers, flush=True)

  start = time.perf_counter()
  run, versions = CONTENDERS[contender](shape)
  first_loss = run(1)
  answer(first_step_seconds=time.perf_counter() - start, first_loss=first_loss,
         versions=versions)
  run(WARMUP_STEPS)
  for line in sys.stdin:
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    loss = run(int(line))
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    answer(seconds=seconds, cpu_seconds=cpu, loss=loss,
           peak_rss_num_mb=after.ru_maxrss // 1024)


class Child:
  """One contender in a process of its own."""

  def __init__(self, contender: str, shape: str, python: str, environment: dict[str, str]):
    command = [python, __file__, '--worker', contender, '--shape', shape]
    self.process = subprocess.Popen(
        command, env=os.environ | environment, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    self.start = self._read()

  def _read(self) -> dict[str, Any]:
    line = self.process.stdout.readline() if self.process.stdout else ''
    if not line:
      raise RuntimeError(f'{self.process.args} ended with code {self.process.wait()}')
    return json.loads(line)

  def take(self, num_steps: int) -> dict[str, Any]:
    """Runs `num_steps` steps: seconds, cpu_seconds, loss, peak_rss_num_mb."""
    assert self.process.stdin
    print(num_steps, file=self.process.stdin, flush=True)
    return self._read()

  def close(self) -> None:
    if self.process.stdin:
      self.process.stdin.close()
    self.process.wait()


def measure(shape_name: str, pythons: dict[str, str], environment: dict[str, str],
            rounds: int, seconds: float) -> dict[str, Any]:
  """Alternating rounds of every contender on one shape."""
  num_tokens = SHAPES[shape_name].batch_size * SHAPES[shape_name].seq_len
  children, rows = {}, {}
  try:
    for name, python in pythons.items():  # one after another: each compiles undisturbed
      children[name] = Child(name, shape_name, python, environment)
    steps = {name: max(1, round(seconds / c.take(1)['seconds'])) for name, c in children.items()}
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
    for _ in range(rounds):
      for name, child in children.items():
        taken[name].append(child.take(steps[name]))
  finally:
    for child in children.values():
      child.close()
  for name, child in children.items():
    rates = [steps[name] * num_tokens / row['seconds'] for row in taken[name]]
    cpu = [row['cpu_seconds'] / steps[name] for row in taken[name]]
    rows[name] = {
        'tokens_per_second': round(statistics.median(rates)),
        'range': [round(min(rates)), round(max(rates))],
        'cpu_seconds_per_step': round(statistics.median(cpu), 3),
        'peak_rss_num_mb': taken[name][-1]['peak_rss_num_mb'],
        'seconds_to_first_step': round(child.start['first_step_seconds'], 1),
        'first_loss': round(child.start['first_loss'], 3),
        'last_loss': round(taken[name][-1]['loss'], 3),
        'steps_per_round': steps[name],
        'versions': child.start['versions'],
    }
  return rows


def present(python: str, module: str) -> bool:
  probe = f'import importlib.util, sys; sys.exit(importlib.util.find_spec("{module}") is None)'
  try:
    return subprocess.run([python, '-c', probe], check=False).returncode == 0
  except OSError:
    return False


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--peer_python', default=sys.executable,
                      help='interpreter that has google-tunix and torch')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--round_seconds', type=float, default=4.0)
  parser.add_argument('--shape', choices=SHAPES, action='append')
  parser.add_argument('--worker', choices=CONTENDERS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    return work(args.worker, SHAPES[args.shape[0]])

  pythons = {}
  for name in CONTENDERS:
    if name not in PEERS:
      pythons[name] = sys.executable
    elif present(args.peer_python, PEERS[name]):
      pythons[name] = args.peer_python
    else:
      print(f'{name} is left out: the interpreter of --peer_python has no {PEERS[name]}.')
  result: dict[str, Any] = {
      'cores': os.cpu_count(), 'machine': platform.machine(),
      'python': platform.python_version(), 'rounds': args.rounds, 'results': []}
  for shape in args.shape or SHAPES:
    for allocator, environment in ALLOCATORS.items():
      print(f'\n{shape} weights, {SHAPES[shape]}, allocator: {allocator}')
      rows = measure(shape, pythons, environment, args.rounds, args.round_seconds)
      for name, row in rows.items():
        ours = rows['jaxrl_pt']['tokens_per_second'] / row['tokens_per_second']
        row['jaxrl_pt_is_times_as_fast'] = round(ours, 2)
        low, high = row['range']
        print(f'  {name:25} {row["tokens_per_second"]:6} tokens/s ({low}–{high}), '
              f'jaxrl_pt is {ours:.2f}×; peak {row["peak_rss_num_mb"]} MB, loss '
              f'{row["first_loss"]} → {row["last_loss"]}', flush=True)
      result['results'].append({'shape': {'name': shape, **SHAPES[shape]._asdict()},
                                'allocator': allocator, 'contenders': rows})
  RESULT.parent.mkdir(parents=True, exist_ok=True)
  RESULT.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
