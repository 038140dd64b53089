"""2B4T's supervised stages with the product's own runs: SFT by summed loss, and DPO.

A small ternary policy is pretrained on WikiText-2. It is fine-tuned on the preferred answers of
PandaLM's prompts with each of SFTS, at the same learning rate; Adam ignores a constant factor of
the gradient, so that the rates are effectively the same too. DPO then goes on from an SFT policy,
with the pairs of the same prompts. The pairs of the other prompts are held out in all stages.
"""

import collections
from collections.abc import Iterator
import json
from pathlib import Path
import shutil
from typing import Any

import two_stages

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings, metrics
from jaxrl_pt.jobs import open as jobs

LENGTH, BATCH = 256, 8
SFT_RATE, DPO_RATE = 2e-3, 1e-4
LONGEST = 600  # characters of a prompt and its longer answer
# The name of an arm → (SFT.loss, AdamW.clip_norm); 0 does not clip.
SFTS = {'mean': ('mean', 1.0), 'sum, without clip': ('sum', 0.0), 'sum, clip 1': ('sum', 1.0)}
SFT_STEPS, DPO_STEPS = 60, 40


# --- Data ---------------------------------------------------------------------------


def pairs(path: Path) -> Iterator[dict[str, str]]:
  """PandaLM's pairs on which two annotators or all three agree: prompt, chosen, rejected.

  Ties, pairs without an answer's text and long ones are left out.
  """
  for row in json.loads(path.read_text(encoding='utf-8')):
    votes = collections.Counter(row[f'annotator{i}'] for i in (1, 2, 3))
    best, count = votes.most_common(1)[0]
    prompt = f'{row["instruction"]}\n{row["input"]}\nAnswer: '
    answers = row['response1'], row['response2']
    if best == 0 or count < 2 or not all(isinstance(a, str) and a.strip() for a in answers):
      continue
    if len(prompt) + max(map(len, answers)) <= LONGEST:
      yield {'prompt': prompt, 'chosen': answers[best - 1], 'rejected': answers[2 - best]}


def write_data(folder: Path, work: Path) -> dict[str, Any]:
  """Writes work/pairs.jsonl, and work/answers.jsonl with each preferred answer once.

  Returns:
    Counts of both, and how often the longer answer of a pair is the preferred one.
  """
  found = list(pairs(folder / 'pref-pandalm' / 'testset-v1.json'))
  answers = list({(p['prompt'], p['chosen']): {'prompt': p['prompt'], 'completion': p['chosen']}
                  for p in found}.values())
  for name, rows in (('pairs', found), ('answers', answers)):
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    (work / f'{name}.jsonl').write_text(text, encoding='utf-8')
  longer = sum(len(p['chosen']) > len(p['rejected']) for p in found) / len(found)
  return {'pairs': len(found), 'prompts': len({p['prompt'] for p in found}),
          'answers': len(answers), 'the longer one is preferred': round(longer, 4)}


# --- Runs ---------------------------------------------------------------------------


def _run(objective: cfg.Objective, data: cfg.Data, seed: int, num_steps: int,
         schedule: cfg.Schedule, clip: float = 1.0, decay: float = 0.0) -> cfg.Run:
  return cfg.Run(
      seed=seed, model=two_stages.build(two_stages.TERNARY).config, data=data, objective=objective,
      optimizer=cfg.AdamW(schedule, weight_decay=decay, clip_norm=clip),
      train=cfg.Train(num_steps, BATCH, log_every=10, eval_every=max(1, num_steps // 2),
                      eval_batches=0, tensorboard=False),
      checkpoint=cfg.Checkpoint(every=num_steps, keep=1), compute=cfg.Compute(unroll=0))


def _trained(run: cfg.Run, workdir: Path) -> list[dict]:
  """The metrics of a run's evaluations; a run that an interrupt cut short begins anew."""
  shutil.rmtree(workdir, ignore_errors=True)
  jobs.train(run, workdir, gin_bindings.dump(run))
  return [{key.removeprefix('validation/'): value for key, value in row.items()
           if key == 'step' or key.startswith('validation/')}
          for row in metrics.read_rows(workdir / 'metrics.jsonl')
          if any(key.startswith('validation/') for key in row)]


def pretrain(folder: Path, work: Path, num_steps: int) -> list[dict]:
  """The policy that SFT starts from, in work/start, by 2B4T's recipe."""
  text = two_stages.data(folder / 'text-wikitext2')
  data = cfg.Data(text.source, text.tokenizer, LENGTH, validation_glob=text.validation_glob)
  schedule = cfg.TwoStage(6e-3, two_stages.SECOND_PEAK * 6e-3, warmup_steps=num_steps // 20,
                          shape='cosine')
  run = _run(cfg.NextToken(), data, 0, num_steps, schedule, decay=two_stages.DECAY)
  return _trained(run, work / 'start')


def _of_policy(source: cfg.Source, length: int) -> cfg.Data:
  return cfg.Data(source, cfg.PolicyTokenizer(), length, validation_fraction=0.25,
                  long_documents='cut')


def fine_tune(work: Path, arm: str, seed: int, num_steps: int = SFT_STEPS) -> list[dict]:
  """SFT from work/start to work/sft-ARM-SEED; seeds differ in the order of the rows."""
  loss, clip = SFTS[arm]
  data = _of_policy(cfg.Conversations(str(work / 'answers.jsonl')), LENGTH)
  run = _run(cfg.SFT(str(work / 'start'), loss), data, seed, num_steps,
             cfg.Cosine(SFT_RATE, warmup_steps=5), clip)
  return _trained(run, sft_workdir(work, arm, seed))


def sft_workdir(work: Path, arm: str, seed: int) -> Path:
  return work / f'sft-{arm.replace(",", "").replace(" ", "-")}-{seed}'


def prefer(work: Path, seed: int, num_steps: int = DPO_STEPS) -> list[dict]:
  """DPO from the summed SFT policy of the seed; a pair and its prompts share a row."""
  start = sft_workdir(work, 'sum, without clip', seed)
  data = _of_policy(cfg.Preferences(str(work / 'pairs.jsonl')), 2 * LENGTH)
  run = _run(cfg.DPO(str(start)), data, seed, num_steps, cfg.Cosine(DPO_RATE, warmup_steps=5))
  return _trained(run, work / f'dpo-{seed}')
