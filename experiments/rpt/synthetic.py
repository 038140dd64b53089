"""RPT on the corpus of modular chains: one seed of every arm (corpus.py describes the corpus).

Pretrain on documents → continue on them (the compute-matched control) or warm-start on noisy
scratchpads and reinforce. All accuracies are of the same held-out positions, of documents that no
training draw holds. The control's rate is tuned on the held-out documents of a seed that is not
reported.
"""

from collections.abc import Callable
import functools

import arms
import corpus
import jax
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import next_token, splits
from jaxrl_pt.types import Batch, Params, Prompts

CONFIG = cfg.Model(num_layers=2, d_model=64, d_ff=192, num_heads=4, num_kv_heads=4, head_dim=16,
                   vocab_size=corpus.VOCAB)
PROXY = cfg.Model(num_layers=1, d_model=48, d_ff=128, num_heads=3, num_kv_heads=3, head_dim=16,
                  vocab_size=corpus.VOCAB)
SETTING = arms.Setting(CONFIG, tuple(corpus.token_bytes()), corpus.THINK, corpus.ANSWER,
                       corpus.END, corpus.LENGTH + 1, corpus.RESPONSE)
NUM_DOCS, NUM_HELD_OUT, BATCH = 20_000, 1_000, 256
PRETRAIN, WARM, RPT_STEPS, SHORT = 450, 180, 80, 20
# Where tuning of the control starts; it goes on until the best rate has two worse neighbours.
TUNING_SEED, CONTROL_RATES = 1_000, (2e-3, 4e-3)
NOISE, CUT = 0.25, 0.5
# Demonstrations of the weak warm start, with which RPT and RLP are compared.
WEAK_WARM, WEAK_NOISE, WEAK_STEPS = 120, 0.6, 40
RATE, MIN_ENTROPY, DIFFICULTY = 6e-4, 1.5, {'easy': 0.5, 'medium': 1.0, 'hard': 1.5}
ROLLOUTS = cfg.Rollouts(num_prompts=32, group_size=8, prompt_len=SETTING.prompt_len,
                        response_tokens=corpus.RESPONSE)
# At chance, 1 in 16, a group of 8 would be right too often to be the case that RLP is for.
WEAK_ROLLOUTS = cfg.Rollouts(num_prompts=128, group_size=2, prompt_len=SETTING.prompt_len,
                             response_tokens=corpus.RESPONSE)
WEAK_THOUGHTS = cfg.Rollouts(num_prompts=128, group_size=2, prompt_len=SETTING.prompt_len,
                             response_tokens=corpus.RESPONSE - 2)
MARKED = (2, 5, 10, 18, 28, 40, 60, 80)
WEAK_MARKED = (10, 20, WEAK_STEPS)
HARD_STEPS = 5  # operations from which a weak thought hardly ever arrives


class Data:
  """Documents of a seed, as packed rows, and the held-out positions of each difficulty."""

  def __init__(self, seed: int) -> None:
    self.seed = seed
    self.train, self.held_out = corpus.split(NUM_DOCS, NUM_HELD_OUT, seed)
    self.apart = splits.refuse_overlap((row.tobytes() for row in self.train.tokens),
                                       (row.tobytes() for row in self.held_out.tokens),
                                       'documents')

  def rows(self, docs: corpus.Documents, ids: np.ndarray) -> Batch:
    """Those documents as examples."""
    weights = np.ones((len(ids), corpus.LENGTH - 1), np.float32)
    return arms.batch_of(docs.tokens[ids], weights, ids)

  def take_documents(self, stream: int):
    """take(step) → a batch of training documents."""
    def take(i: int) -> Batch:
      rng = np.random.default_rng([self.seed, stream, i])
      return self.rows(self.train, rng.integers(0, NUM_DOCS, BATCH))
    return take

  def take_demonstrations(self, stream: int, noise: float):
    """take(step) → a batch of contexts with noisy thoughts."""
    def take(i: int) -> Batch:
      rng = np.random.default_rng([self.seed, stream, i])
      tokens, weights = corpus.demonstrations(self.train, BATCH, noise, CUT, rng)
      return arms.batch_of(tokens, weights, np.arange(BATCH))
    return take

  def prompts(self, docs: corpus.Documents, positions: next_token.Positions) -> Prompts:
    """Contexts that end at these positions."""
    examples = self.rows(docs, np.unique(positions.example))
    return next_token.build_prompts(examples, positions, prompt_len=corpus.LENGTH,
                                    num_continuation=4)

  def take_prompts(self, positions: next_token.Positions, num_prompts: int, shuffled: bool = False):
    """take(step) → contexts with the think marker; `shuffled` gives each another's truth."""
    def take(i: int) -> Prompts:
      rows = next_token.step_rows(len(positions), num_prompts, self.seed, i)
      prompts = arms.reasoning_prompts(SETTING,
                                       self.prompts(self.train, positions.take(rows)))
      if not shuffled:
        return prompts
      order = np.random.default_rng([self.seed, 5, i]).permutation(num_prompts)
      truths = {name: prompts.extras[name][order]
                for name in ('continuation', 'continuation_lengths')}
      return prompts.replace(extras={**prompts.extras, **truths})
    return take

  def score(self, config: cfg.Model, params: Params, docs: corpus.Documents, num_docs: int,
            minimum: float) -> next_token.Positions:
    """Positions of the first documents whose entropy under a proxy is at least `minimum`."""
    parts = []
    for start in range(0, num_docs, 500):
      batch = self.rows(docs, np.arange(start, start + 500))
      entropy = np.asarray(arms.entropy(config)(params, batch))
      parts.append(next_token.select_positions(entropy, batch, min_entropy=minimum))
    return next_token.concatenate(parts)


class HeldOut:
  """Held-out contexts and how hard they are, by the pretrained model's entropy."""

  def __init__(self, data: Data, base: Params, size: int = 768) -> None:
    everything = data.score(CONFIG, base, data.held_out, NUM_HELD_OUT, 0.0)
    order = np.random.default_rng(data.seed).permutation(len(everything))
    everything, apart = arms.unseen(data.train.tokens, data.held_out.tokens,
                                    everything.take(order))
    print(f'seed {data.seed}: {data.apart}; {apart}', flush=True)
    sure = everything.take(np.flatnonzero(everything.entropy < 0.05)[:256])
    # As many of each kind as there are prompts, so that the hard split is large.
    hard = everything.take(np.flatnonzero(everything.entropy > DIFFICULTY['hard'])[:size // 2])
    easy = everything.take(np.flatnonzero(
        (everything.entropy > DIFFICULTY['easy'])
        & (everything.entropy <= DIFFICULTY['hard']))[:size // 2])
    self.positions = next_token.concatenate([sure, hard, easy])
    self.contexts = data.prompts(data.held_out, self.positions)
    target = self.positions.t + 1
    self.steps = np.zeros(len(target), int)
    for block, place in enumerate(corpus.RESULTS):
      at = target == place
      self.steps[at] = data.held_out.steps[self.positions.example[at], block]

  def masks(self) -> dict[str, np.ndarray]:
    """Which positions each accuracy is of: a difficulty, filler, the steps of a result."""
    entropy = self.positions.entropy
    masks = {name: entropy > threshold for name, threshold in DIFFICULTY.items()}
    masks['filler'] = entropy < 0.05
    masks.update({f'steps_{k}': self.steps == k for k in range(1, corpus.SLOTS + 1)})
    return {name: mask for name, mask in masks.items() if mask.any()}

  def split(self, correct: np.ndarray) -> dict[str, float]:
    """The accuracy of each mask."""
    return {name: float(correct[mask].mean()) for name, mask in self.masks().items()}

  def measure(self, params: Params, **how) -> dict[str, float]:
    """Accuracies of a policy; `how` as in `arms.correct`."""
    return self.split(arms.correct(SETTING, params, self.contexts, **how))


  def truth(self, params: Params) -> dict[str, dict[str, float]]:
    """Chance and log-probability (nats) of the truth after a sampled thought."""
    logp = arms.truth_after_thought(SETTING, params, self.contexts)
    return {'chance': self.split(np.exp(logp).mean(-1)), 'nats': self.split(logp.mean(-1))}


def warm_start(data: Data, params: Params, stream: int, noise: float, num_steps: int) -> Params:
  """Supervised learning of noisy thoughts."""
  return arms.supervise(CONFIG, params, data.take_demonstrations(stream, noise), num_steps, 4e-3)


def matched_steps() -> int:
  """Steps of pretraining that cost what warm start and RPT cost together."""
  one = arms.training_flops(CONFIG, BATCH * (corpus.LENGTH - 1))
  warm = arms.training_flops(CONFIG, BATCH * (corpus.LENGTH + corpus.RESPONSE)) * WARM
  return round((warm + RPT_STEPS * arms.rollout_flops(SETTING, ROLLOUTS)) / one)


def pretrain(data: Data) -> Params:
  """The model that every arm starts from."""
  start = P.init(SETTING.model.specs, jax.random.key(data.seed))
  return arms.supervise(CONFIG, start, data.take_documents(0), PRETRAIN, 4e-3)


def control(data: Data, base: Params, rate: float) -> Params:
  """Next-token prediction with the compute of warm start and RPT together."""
  return arms.supervise(CONFIG, base, data.take_documents(1), matched_steps(), rate)


def tune_control() -> dict:
  """Accuracy of the control on the hard split by its peak rate, and the best rate."""
  data, found = Data(TUNING_SEED), {}
  base = pretrain(data)
  held_out = HeldOut(data, base)
  wanted = list(CONTROL_RATES)
  while wanted:
    for rate in wanted:
      measured = held_out.measure(control(data, base, rate), reasoning=False)
      found[rate] = round(measured['hard'], 3)
      print(f'control continued at {rate:g}: {found[rate]:.3f}', flush=True)
    best = max(found, key=found.__getitem__)
    wanted = [rate for rate in (best / 2, best * 2) if rate not in found]
  return {'rate': best, 'hard accuracy': {f'{r:g}': v for r, v in sorted(found.items())}}


def run_seed(seed: int, tuned: Callable[[], dict]) -> dict:
  """Every arm under one seed; the control at the tuned rate, which is asked for last."""
  data = Data(seed)
  base = pretrain(data)
  held_out = HeldOut(data, base)
  greedy = functools.partial(held_out.measure, reasoning=True)
  argmax = functools.partial(held_out.measure, reasoning=False)
  result = {'seed': seed, 'control_steps': matched_steps(),
            'held_out_documents': data.apart.num_held_out,
            'counts': {name: int(mask.sum()) for name, mask in held_out.masks().items()},
            'ntp_argmax': argmax(base)}

  proxy = P.init(arms.build(PROXY).specs, jax.random.key(100 + seed))
  proxy = arms.supervise(PROXY, proxy, data.take_documents(2), PRETRAIN // 2, 4e-3)
  chosen = data.score(PROXY, proxy, data.train, 6_000, MIN_ENTROPY)
  unfiltered = data.score(PROXY, proxy, data.train, 6_000, 0.0)
  result['filter_keeps'] = len(chosen) / len(unfiltered)

  warm = warm_start(data, base, 3, NOISE, WARM)
  sampled = functools.partial(held_out.measure, reasoning=True, temperature=1.0, num_samples=2)
  reinforce = functools.partial(arms.reinforce, SETTING, warm, rollouts=ROLLOUTS, rate=RATE,
                                num_steps=RPT_STEPS)
  rpt = reinforce(data.take_prompts(chosen, 32), measure=sampled, marked=MARKED)
  shuffled = reinforce(data.take_prompts(chosen, 32, shuffled=True))
  everywhere = reinforce(data.take_prompts(unfiltered, 32))
  for name, params in (('warm', warm), ('rpt', rpt.params), ('shuffled', shuffled.params),
                       ('unfiltered', everywhere.params)):
    result[name] = {'greedy': greedy(params), 'sampled': sampled(params),
                    'argmax': argmax(params)}
  result['curve'] = rpt.scores
  result['rows'] = {'rpt': rpt.rows, 'shuffled': shuffled.rows, 'unfiltered': everywhere.rows}
  result.update(compare_with_rlp(data, base, chosen, held_out))
  result['ntp_matched_argmax'] = argmax(control(data, base, tuned()['rate']))
  return result


def compare_with_rlp(data: Data, base: Params, chosen: next_token.Positions,
                     held_out: HeldOut) -> dict:
  """RPT and RLP from one weak warm start, at results of many steps, with equal rollouts."""
  weak = warm_start(data, base, 4, WEAK_NOISE, WEAK_WARM)
  steps = np.zeros(len(chosen), int)
  for block, place in enumerate(corpus.RESULTS):
    at = chosen.t + 1 == place
    steps[at] = data.train.steps[chosen.example[at], block]
  hardest = chosen.take(np.flatnonzero(steps >= HARD_STEPS))
  result = {}
  for name, rlp, rollouts in (('weak_rpt', False, WEAK_ROLLOUTS), ('weak_rlp', True,
                                                                 WEAK_THOUGHTS)):
    curve = arms.reinforce(SETTING, weak, data.take_prompts(hardest, rollouts.num_prompts),
                           rollouts, rate=RATE, num_steps=WEAK_STEPS, measure=held_out.truth,
                           marked=WEAK_MARKED, rlp=rlp)
    result[name] = {'curve': curve.scores, 'rows': curve.rows,
                    'greedy': held_out.measure(curve.params, reasoning=True)}
  return result
