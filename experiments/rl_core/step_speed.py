"""One GRPO step on this CPU (rollout, reward, update): jaxrl_pt, TRL and Tunix.

    python experiments/rl_core/step_speed.py --peer_python PATH

PATH is a Python interpreter that has google-tunix, torch, transformers and trl. All take the
same Llama shape in float32, 8 prompts × 8 samples of 64 + 64 tokens or more (`SETTINGS`), none of
which ends early, the same reward (share of even tokens, computed on the host), no KL, AdamW, one
update a batch. Each contender is a child that compiles, warms up and then waits; rounds of one
step alternate between them, so that what else the machine does meets all alike. Medians, all
rounds and the split of jaxrl_pt's step go to results/step_speed.json.
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
import tempfile
import time
from typing import Any, NamedTuple

RESULT = Path(__file__).parent / 'results' / 'step_speed.json'
PROMPTS, SAMPLES, PROMPT, RATE = 8, 8, 64, 1e-5
WARMUP = 1


class Setting(NamedTuple):
  """A model's shape, how many tokens each response has, and what each contender learns from at
  once, each as it is fastest: `trl_rows` responses of 16 and 64, and all prompts or 1 / 4 or 1 / 8
  of them here, were tried; Tunix does not fit 24 GiB with more than two of the long prompts."""

  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  vocab_size: int
  new: int
  accumulation: int = 4
  trl_rows: int = 16
  tunix_prompts: int = PROMPTS


SMALL = Setting(6, 192, 512, 6, 2, 32, 1024, 64)
SETTINGS = {'2.8M, 64 + 64': SMALL,
            '2.8M, 64 + 512': SMALL._replace(new=512, accumulation=8, tunix_prompts=2),
            '15.7M, 64 + 64': Setting(8, 384, 1024, 6, 2, 64, 4096, 64)}

# step() → seconds by stage, 'step' among them
Step = Callable[[], dict[str, float]]


def prompt_ids(setting: Setting, step: int) -> Any:
  """i32[PROMPTS, PROMPT]; the first ids are left to special tokens."""
  import numpy as np
  rng = np.random.default_rng(step)
  return rng.integers(8, setting.vocab_size, (PROMPTS, PROMPT)).astype(np.int32)


# --- Contenders -----------------------------------------------------------------------


def jaxrl_pt(setting: Setting) -> Step:
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jaxrl_pt import config as cfg
  from jaxrl_pt import params as P
  from jaxrl_pt.models import transformer
  from jaxrl_pt.parallel.mesh import make_mesh
  from jaxrl_pt.sampling.groups import make_sampler
  from jaxrl_pt.train import optim, state, update
  from jaxrl_pt.types import Prompts, Verdict

  rollouts = cfg.Rollouts(num_prompts=PROMPTS, group_size=SAMPLES, prompt_len=PROMPT,
                          response_tokens=setting.new)
  method = cfg.Algorithm(advantage=cfg.GRPO(), surrogate=cfg.PPOClip(),
                         aggregation=cfg.SequenceMeanTokenMean())
  run = cfg.Run(
      seed=0, model=cfg.Model(*setting[:7]),
      data=cfg.Data(cfg.PythonStdlib(), cfg.Bytes(), PROMPT + setting.new),
      objective=cfg.RPT('unread', rollouts=rollouts, algorithm=method),
      optimizer=cfg.AdamW(cfg.ConstantRate(RATE), weight_decay=0.0),
      train=cfg.Train(num_steps=1000, batch_size=PROMPTS, accumulation=setting.accumulation),
      compute=cfg.Compute(unroll=0))
  model = transformer.build(run.model, run.compute)
  optimizer = optim.make_optimizer(run.optimizer, run.train.num_steps, model.specs)
  mesh = make_mesh(run.mesh)
  new_method = lambda params: state.new_method(rollouts, method, setting.d_model)
  now = state.state_of(model, P.init(model.specs, jax.random.key(0)), optimizer,
                       state.abstract_state(model, optimizer, mesh, new_method), new_method)
  sample = jax.jit(make_sampler(model, run.seed, rollouts, (setting.vocab_size + 1,)))
  learn = jax.jit(update.make_learner(model, optimizer, run, rollouts, method), donate_argnums=0)
  number = 0

  def step() -> dict[str, float]:
    nonlocal now, number
    times = [time.perf_counter()]
    prompts = Prompts(jnp.asarray(prompt_ids(setting, number)), jnp.full(PROMPTS, PROMPT),
                      jnp.arange(PROMPTS))
    drawn = sample(now.params, prompts, jnp.int32(number), jnp.int32(number))
    tokens = np.asarray(drawn.tokens)
    assert np.asarray(drawn.in_response).all()
    times.append(time.perf_counter())
    reward = jnp.asarray((tokens % 2 == 0).mean(-1), jnp.float32)
    verdict = Verdict(reward, jnp.ones_like(reward), jnp.zeros_like(reward), {})
    times.append(time.perf_counter())
    now, _ = learn(now, prompts, drawn, verdict, jnp.zeros_like(drawn.logp))
    jax.block_until_ready(now)
    times.append(time.perf_counter())
    number += 1
    split = dict(zip(('generate', 'verify', 'update'),
                     (b - a for a, b in zip(times, times[1:], strict=False)), strict=True))
    return {'step': times[-1] - times[0], **split}

  return step


def _word_tokenizer(setting: Setting) -> Any:
  """A transformers tokenizer whose token i is the word t{i}."""
  import tokenizers
  import transformers

  words = {f't{i}': i for i in range(setting.vocab_size)}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='t0'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, pad_token='t0', eos_token='t1', bos_token='t2', unk_token='t0')


def _texts(setting: Setting, step: int) -> list[str]:
  return [' '.join(f't{i}' for i in row) for row in prompt_ids(setting, step)]


def _reward(completions: list[str], **unused: Any) -> list[float]:
  ids = [[int(word[1:]) for word in text.split()] for text in completions]
  return [sum(i % 2 == 0 for i in row) / max(1, len(row)) for row in ids]


def _serve_from_inside(train: Callable[[Callable[[], None]], None]) -> None:
  """For trainers that own the loop: `train` calls its argument after each step."""
  done = 0
  last = time.perf_counter()

  def after_step() -> None:
    nonlocal done, last
    seconds, done = time.perf_counter() - last, done + 1
    if done == WARMUP:
      print('ready', flush=True)
    if done > WARMUP:
      print(json.dumps({'step': seconds}), flush=True)
    if done >= WARMUP and not sys.stdin.readline():
      sys.exit(0)
    last = time.perf_counter()

  train(after_step)


def trl(setting: Setting, after_step: Callable[[], None]) -> None:
  import datasets
  import torch
  import transformers
  from trl import GRPOConfig, GRPOTrainer

  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=setting.vocab_size, hidden_size=setting.d_model, intermediate_size=setting.d_ff,
      num_hidden_layers=setting.num_layers, num_attention_heads=setting.num_heads,
      num_key_value_heads=setting.num_kv_heads, head_dim=setting.head_dim,
      tie_word_embeddings=True, max_position_embeddings=1024, eos_token_id=1, pad_token_id=0))

  class Clock(transformers.TrainerCallback):
    def on_step_end(self, *unused: Any, **more: Any) -> None:
      after_step()

  rows = datasets.Dataset.from_list([{'prompt': p} for i in range(200) for p in _texts(setting, i)])
  with tempfile.TemporaryDirectory() as folder:
    config = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=setting.trl_rows,
        gradient_accumulation_steps=PROMPTS * SAMPLES // setting.trl_rows,
        num_generations=SAMPLES, max_completion_length=setting.new, beta=0.0, learning_rate=RATE,
        lr_scheduler_type='constant', loss_type='grpo', temperature=1.0, max_steps=200,
        generation_kwargs={'min_new_tokens': setting.new}, use_cpu=True, bf16=False,
        report_to='none', logging_strategy='no', save_strategy='no', disable_tqdm=True,
        gradient_checkpointing=False)
    GRPOTrainer(model, _reward, args=config, train_dataset=rows,
                processing_class=_word_tokenizer(setting), callbacks=[Clock()]).train()


def tunix(setting: Setting, after_step: Callable[[], None]) -> None:
  from flax import nnx
  import jax
  import numpy as np
  import optax
  from tunix.models.llama3 import model as llama3
  from tunix.rl import rl_cluster
  from tunix.rl.grpo import grpo_learner
  from tunix.rl.rollout import base_rollout

  shape = llama3.ModelConfig(
      num_layers=setting.num_layers, vocab_size=setting.vocab_size, embed_dim=setting.d_model,
      hidden_dim=setting.d_ff, num_heads=setting.num_heads, head_dim=setting.head_dim,
      num_kv_heads=setting.num_kv_heads, rope_theta=10_000, norm_eps=1e-5, weight_tying=True)
  mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with mesh:
    model = llama3.Llama3(shape, rngs=nnx.Rngs(0))

  class Tokens:
    """Token i is the word t{i}; an EOS that is never drawn keeps all responses long."""

    def encode(self, text: str, **unused: Any) -> list[int]:
      return [int(w[1:]) for w in text.split()][1:]  # The sampler puts a BOS before it.

    def decode(self, tokens: Any, **unused: Any) -> str:
      return ' '.join(f't{int(i)}' for i in tokens)

    bos_id, pad_id = (lambda self: 2), (lambda self: 0)
    eos_id = lambda self: setting.vocab_size + 1

    def dedup_bos_ids(self, tokens: list[int]) -> list[int]:
      return tokens

  roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT, rl_cluster.Role.REFERENCE)
  cluster = rl_cluster.RLCluster(
      actor=model, tokenizer=Tokens(), cluster_config=rl_cluster.ClusterConfig(
          role_to_mesh=dict.fromkeys(roles, mesh), rollout_engine='vanilla',
          training_config=rl_cluster.RLTrainingConfig(
              actor_optimizer=optax.adamw(RATE), eval_every_n_steps=10**9, max_steps=200,
              mini_batch_size=PROMPTS, train_micro_batch_size=setting.tunix_prompts),
          rollout_config=base_rollout.RolloutConfig(
              max_tokens_to_generate=setting.new, max_prompt_length=PROMPT,
              kv_cache_size=PROMPT + setting.new + 1, temperature=1.0, top_p=1.0)))

  def batches() -> Iterator[dict[str, Any]]:
    for i in range(200):
      yield {'prompts': np.array(_texts(setting, i))}
      # The learner asks for more once it has dispatched an update: wait for that.
      jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
      after_step()

  learner = grpo_learner.GRPOLearner(
      cluster, grpo_learner.GRPOConfig(num_generations=SAMPLES, num_iterations=1, beta=0.0),
      lambda prompts, completions, **unused: _reward(completions))
  learner.train(batches())


def serve(name: str, setting: Setting) -> None:
  """The child: one step for each line on standard input."""
  if name != 'jaxrl_pt':
    train = functools.partial({'trl': trl, 'tunix': tunix}[name], setting)
    return _serve_from_inside(train)
  step = jaxrl_pt(setting)
  for _ in range(WARMUP):
    step()
  print('ready', flush=True)
  for _ in sys.stdin:
    print(json.dumps(step()), flush=True)


# --- Rounds -----------------------------------------------------------------------------


def cell(setting: str, num_rounds: int, peer_python: str) -> dict[str, Any]:
  pythons = {'jaxrl_pt': sys.executable, 'trl': peer_python, 'tunix': peer_python}
  children = {name: subprocess.Popen(
      [python, __file__, '--child', name, setting], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL, text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
      for name, python in pythons.items()}

  def line(name: str) -> str:
    for text in children[name].stdout:
      if text.startswith(('ready', '{"step"')):
        return text
    raise SystemExit(f'{name} ended early: run it alone with --child {name} "{setting}"')

  for name in children:
    line(name)
  rounds: dict[str, list[dict[str, float]]] = {name: [] for name in children}
  for _ in range(num_rounds):
    for name, child in children.items():
      child.stdin.write('go\n')
      child.stdin.flush()
      rounds[name].append(json.loads(line(name)))
  for child in children.values():
    child.kill()
  seconds = {name: statistics.median(r['step'] for r in rows) for name, rows in rounds.items()}
  split = {stage: statistics.median(r[stage] for r in rounds['jaxrl_pt'])
           for stage in ('generate', 'verify', 'update')}
  ratio = min(seconds['trl'], seconds['tunix']) / seconds['jaxrl_pt']
  print(f'{setting}: ' + '  '.join(f'{name} {value:.2f} s' for name, value in seconds.items())
        + f'  → {ratio:.2f}×; ours: '
        + '  '.join(f'{stage} {value:.2f}' for stage, value in split.items()), flush=True)
  return {'seconds_a_step': seconds, 'split_of_jaxrl_pt': split,
          'faster_than_the_faster': ratio, 'rounds': rounds}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--peer_python', default=sys.executable)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--only', choices=SETTINGS, help='one setting; the other results stay')
  parser.add_argument('--child', nargs=2, metavar=('NAME', 'SETTING'))
  args = parser.parse_args()
  if args.child:
    return serve(args.child[0], SETTINGS[args.child[1]])
  results = json.loads(RESULT.read_text()) if args.only else {}
  for setting in [args.only] if args.only else SETTINGS:
    results[setting] = cell(setting, args.rounds, args.peer_python)
  RESULT.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
  main()
