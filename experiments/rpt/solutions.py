"""RPT on real text: the worked solutions of GSM8K, by a model of 0.38M parameters.

The solutions carry calculator notes, `48/2 = <<48/2=24>>24`. They are taken out of the
corpus, so that the number after `=` has to be worked out, and serve as the noisy thoughts of
the warm start: think `48/2=24`, answer `24`. Everywhere else the thought is empty. A tenth of the
training file is held out, by a hash of the solution; what the control's rate is tuned on is not
what is reported.
"""

import functools
import gzip
import json
from pathlib import Path
import re
from typing import NamedTuple

import arms
import jax
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import next_token, pack, splits, tokenizer
from jaxrl_pt.types import Batch, Params, Prompts

VOCAB, LENGTH, THOUGHT = 512, 96, 14
NOTE = re.compile(r'<<([^<>]*)>>')
# Characters that no solution has: one byte, so one token.
THINK, ANSWER = '\x01', '\x02'
CONFIG = cfg.Model(num_layers=3, d_model=96, d_ff=256, num_heads=4, num_kv_heads=4, head_dim=24,
                   vocab_size=VOCAB)
BATCH, PRETRAIN, RPT_STEPS, RATE = 16, 400, 60, 1e-4
# Documents that accuracies are of, where the tuning of the control starts, and its seed.
MEASURED, CONTROL_RATES, TUNING_SEED = 600, (2e-3, 4e-3), 1_000
WARM, WARM_BATCH, NOISE = 200, 48, 0.3
MIN_ENTROPY, DIFFICULTY = 0.5, {'easy': 0.5, 'medium': 1.0, 'hard': 1.5}
ROLLOUTS = cfg.Rollouts(num_prompts=16, group_size=8, prompt_len=LENGTH + 1,
                        response_tokens=THOUGHT + 3)


class Solution(NamedTuple):
  """One document."""

  tokens: list[int]
  notes: dict[int, str]  # by the place of the result's first token


class Corpus(NamedTuple):
  """Training and held-out documents as rows, with their notes."""

  setting: arms.Setting
  encode: tokenizer.Tokenizer
  train: list[Solution]
  held_out: list[Solution]


def is_there(data: Path) -> bool:
  """Whether the data set is in this folder."""
  return (data / 'math-gsm8k' / 'train.jsonl.gz').is_file()


def _strip(text: str) -> tuple[str, list[tuple[int, str]]]:
  """The text without notes, and where each stood in it."""
  plain, notes, at = '', [], 0
  for found in NOTE.finditer(text):
    plain += text[at:found.start()]
    notes.append((len(plain.encode()), found.group(1)))
    at = found.end()
  return plain + text[at:], notes


@functools.cache
def load(data: Path) -> Corpus:
  """Solutions in the tokens of a byte-level BPE trained on them."""
  with gzip.open(data / 'math-gsm8k' / 'train.jsonl.gz', 'rt', encoding='utf-8') as f:
    stripped = [_strip(json.loads(line)['answer']) for line in f]
  sides = [s for s in stripped if pack.hold_out(s[0]) >= 0.1], [
      s for s in stripped if pack.hold_out(s[0]) < 0.1]
  print(splits.refuse_overlap(*([text for text, _ in side] for side in sides), 'documents'),
        flush=True)
  stripped, num_train = sides[0] + sides[1], len(sides[0])
  tok = tokenizer.train_or_load(cfg.TrainedBPE(VOCAB), [t for t, _ in sides[0]])
  table = tok.token_bytes()
  documents = []
  for ids, (_, notes) in zip(tok.encode_batch([t for t, _ in stripped]), stripped, strict=True):
    ids = [*ids, tok.eos_id][:LENGTH]
    ends = np.cumsum([len(table[i]) for i in ids])
    places = {}
    for offset, note in notes:
      place = int(np.searchsorted(ends, offset, side='right'))
      if 0 < place < len(ids):
        places[place] = note
    documents.append(Solution(ids, places))
  (think,), (answer,) = tok.encode(THINK), tok.encode(ANSWER)
  # Markers spell nothing in a prediction.
  spelled = tuple(b'' if i in (think, answer) else b for i, b in enumerate(table))
  setting = arms.Setting(CONFIG, spelled, think, answer, tok.eos_id, LENGTH + 1, THOUGHT + 3)
  return Corpus(setting, tok, documents[:num_train], documents[num_train:])


def rows(documents: list[Solution], ids: np.ndarray) -> Batch:
  """Those documents as examples, one in a row."""
  tokens = np.zeros((len(ids), LENGTH + 1), np.int32)
  weights = np.zeros((len(ids), LENGTH), np.float32)
  for n, i in enumerate(ids):
    sequence = documents[i].tokens
    tokens[n, :len(sequence)] = sequence
    weights[n, :len(sequence) - 1] = 1
  batch = arms.batch_of(tokens, weights, np.asarray(ids))
  return batch.replace(segments=(np.arange(LENGTH) <= weights.sum(-1)[:, None]).astype(np.int32))


def demonstrations(corpus: Corpus, rng: np.random.Generator) -> Batch:
  """Contexts with a thought and a prediction: half at a result, half anywhere."""
  setting, width = corpus.setting, LENGTH + 1 + THOUGHT + 3
  tokens = np.zeros((WARM_BATCH, width), np.int32)
  weights = np.zeros((WARM_BATCH, width - 1), np.float32)
  for n in range(WARM_BATCH):
    document = corpus.train[rng.integers(len(corpus.train))]
    at, thought = int(rng.integers(1, len(document.tokens))), []
    if document.notes and rng.random() < 0.5:
      at = int(rng.choice(list(document.notes)))
      thought = _thought(corpus, document.notes[at], rng)
    sequence = [*document.tokens[:at], setting.think, *thought, setting.answer,
                document.tokens[at], setting.end]
    tokens[n, :len(sequence)] = sequence
    weights[n, :at - 1] = 1
    weights[n, at:len(sequence) - 1] = 1
  return arms.batch_of(tokens, weights, np.arange(WARM_BATCH))


def _thought(corpus: Corpus, note: str, rng: np.random.Generator) -> list[int]:
  """The note's tokens; with some chance its result is a random number."""
  expression, equals, _ = note.rpartition('=')
  if equals and rng.random() < NOISE:
    note = f'{expression}={rng.integers(1, 200)}'
  return corpus.encode.encode(note)[:THOUGHT]


def prompts(documents: list[Solution], positions: next_token.Positions) -> Prompts:
  """Contexts that end at these positions."""
  examples = rows(documents, np.unique(positions.example))
  return next_token.build_prompts(examples, positions, prompt_len=LENGTH, num_continuation=4)


def score(corpus: Corpus, documents: list[Solution], params: Params,
          minimum: float) -> next_token.Positions:
  """Positions of documents at which the policy is unsure."""
  has_bytes = np.array([len(b) > 0 for b in corpus.setting.token_bytes]
                       + [False] * (VOCAB - len(corpus.setting.token_bytes)))
  parts = []
  for start in range(0, len(documents), 60):
    batch = rows(documents, np.arange(start, min(start + 60, len(documents))))
    entropy = np.asarray(arms.entropy(CONFIG)(params, batch))
    parts.append(next_token.select_positions(entropy, batch, min_entropy=minimum, min_context=8,
                                             predictable=has_bytes))
  return next_token.concatenate(parts)


class HeldOut:
  """Held-out contexts by difficulty, and those whose truth is a result."""

  def __init__(self, corpus: Corpus, base: Params, documents: list[Solution],
               size: int = 512) -> None:
    self.setting = corpus.setting
    found, apart = arms.unseen(*(rows(side, np.arange(len(side))).tokens
                                 for side in (corpus.train, documents)),
                               score(corpus, documents, base, MIN_ENTROPY))
    print(apart, flush=True)
    is_result = np.array([t + 1 in documents[e].notes
                          for e, t in zip(found.example, found.t, strict=True)])
    order = np.random.default_rng(0).permutation(len(found))
    # Results are rare: half of the contexts are theirs, the other half is drawn from all.
    chosen = np.concatenate([order[:size // 2], order[is_result[order]][:size // 2]])
    self.positions, self.is_result = found.take(chosen), is_result[chosen]
    self.plain = np.arange(len(chosen)) < size // 2
    self.contexts = prompts(documents, self.positions)

  def masks(self) -> dict[str, np.ndarray]:
    """Which contexts each accuracy is of."""
    entropy = self.positions.entropy
    masks = {name: self.plain & (entropy > least) for name, least in DIFFICULTY.items()}
    return {**masks, 'result': self.is_result}

  def measure(self, params: Params, **how) -> dict[str, float]:
    """Accuracies of a policy; `how` as in `arms.correct`."""
    correct = arms.correct(self.setting, params, self.contexts, **how)
    return {name: float(correct[mask].mean()) for name, mask in self.masks().items()}


def matched_steps() -> int:
  """Steps of pretraining that cost what warm start and RPT cost together."""
  one = arms.training_flops(CONFIG, BATCH * LENGTH)
  warm = arms.training_flops(CONFIG, WARM_BATCH * (LENGTH + THOUGHT + 3)) * WARM
  setting = arms.Setting(CONFIG, (), 0, 0, 0, LENGTH + 1, THOUGHT + 3)
  return round((warm + RPT_STEPS * arms.rollout_flops(setting, ROLLOUTS)) / one)


def take_documents(corpus: Corpus, seed: int, stream: int):
  """take(step) → a batch of training documents."""
  def take(i: int) -> Batch:
    rng = np.random.default_rng([seed, stream, i])
    return rows(corpus.train, rng.integers(0, len(corpus.train), BATCH))
  return take


def pretrain(corpus: Corpus, seed: int) -> Params:
  """The model that every arm starts from."""
  start = P.init(corpus.setting.model.specs, jax.random.key(seed))
  return arms.supervise(CONFIG, start, take_documents(corpus, seed, 0), PRETRAIN, 3e-3)


def control(corpus: Corpus, seed: int, base: Params, rate: float) -> Params:
  """Next-token prediction with the compute of warm start and RPT together."""
  return arms.supervise(CONFIG, base, take_documents(corpus, seed, 1), matched_steps(), rate)


def tune_control(data: Path) -> dict:
  """Accuracy on the easy split, the largest, by the control's rate, on documents of its own."""
  corpus = load(data)
  base, found = pretrain(corpus, TUNING_SEED), {}
  held_out = HeldOut(corpus, base, corpus.held_out[MEASURED:])
  wanted = list(CONTROL_RATES)
  while wanted:
    for rate in wanted:
      found[rate] = held_out.measure(control(corpus, TUNING_SEED, base, rate),
                                     reasoning=False)['easy']
      print(f'control at {rate:g}: {found[rate]:.3f}', flush=True)
    best = max(found, key=found.__getitem__)
    wanted = [rate for rate in (best / 2, best * 2) if rate not in found]
  return {'rate': best, 'easy accuracy': {f'{r:g}': v for r, v in sorted(found.items())}}


def run_seed(data: Path, seed: int, rate: float) -> dict:
  """Pretraining, its compute-matched control at `rate`, warm start and RPT under one seed."""
  corpus = load(data)
  setting = corpus.setting
  base = pretrain(corpus, seed)
  matched = control(corpus, seed, base, rate)
  warm = arms.supervise(
      CONFIG, base, lambda i: demonstrations(corpus, np.random.default_rng([seed, 3, i])), WARM,
      2e-3)
  held_out = HeldOut(corpus, base, corpus.held_out[:MEASURED])
  chosen = score(corpus, corpus.train[:1260], base, MIN_ENTROPY)

  def take_prompts(i: int) -> Prompts:
    chosen_rows = next_token.step_rows(len(chosen), ROLLOUTS.num_prompts, seed, i)
    return arms.reasoning_prompts(setting, prompts(corpus.train, chosen.take(chosen_rows)))

  rpt = arms.reinforce(setting, warm, take_prompts, ROLLOUTS, rate=RATE, num_steps=RPT_STEPS)
  sampled = dict(reasoning=True, temperature=1.0, num_samples=4)
  return {
      'seed': seed, 'control_steps': matched_steps(), 'rows': rpt.rows,
      'counts': {k: int(m.sum()) for k, m in held_out.masks().items()},
      'ntp_argmax': held_out.measure(base, reasoning=False),
      'ntp_matched_argmax': held_out.measure(matched, reasoning=False),
      'warm_greedy': held_out.measure(warm, reasoning=True),
      'warm_sampled': held_out.measure(warm, **sampled),
      'rpt_greedy': held_out.measure(rpt.params, reasoning=True),
      'rpt_sampled': held_out.measure(rpt.params, **sampled),
      'rpt_argmax': held_out.measure(rpt.params, reasoning=False)}
