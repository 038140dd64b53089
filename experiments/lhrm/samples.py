"""HFT-RFT and HFT-DPO: data from the HFT policy's own answers to the prompts that HGPO gets.

The paper's baselines (LHRM 2505.14631, section 4.1) from two answers in each mode: the best of the
four to be learned, or the best of the better mode to be preferred to the worst of the worse one.
"""

import json
from pathlib import Path

import measure
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.data import problems
from jaxrl_pt.run.policy import load_policy

NUM_PROMPTS, EACH = 3200, 2  # as many prompts as 200 steps of 16
MARGIN = 0.2  # δ of HGPO


def prepare(kind: str, start: Path, out: Path, seed: int) -> tuple[list[str], list[str]]:
  """Writes the data, and says with which files and bindings to train on them."""
  policy = load_policy(start)
  training, _ = problems.load(cfg.Problems(cfg.HybridSums(40000), held_out=0.2))
  draw = np.random.default_rng(seed)
  chosen = [training[i] for i in draw.choice(len(training), NUM_PROMPTS, replace=False)]
  answers, tokens = measure.drawn(policy, chosen, 64, EACH, seed)
  text = lambda n, mode, i: policy.session.data.tokenizer.decode(
      [t for t in tokens[n, mode * EACH + i].tolist() if t >= 0 and t not in
       policy.session.data.tokenizer.stop_ids])
  lines = []
  for n, problem in enumerate(chosen):
    score = answers['correct'][n]
    better = int(score[0].mean() <= score[1].mean() + MARGIN)
    best, worst = int(score[better].argmax()), int(score[1 - better].argmin())
    chosen_text = text(n, better, best)
    if kind == 'rft' and score[better, best]:
      lines.append({'prompt': problem.prompt, 'completion': chosen_text})
    if kind == 'dpo':
      lines.append({'prompt': problem.prompt, 'chosen': chosen_text,
                    'rejected': text(n, 1 - better, worst)})
  out.write_text(''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8')
  source = 'Conversations' if kind == 'rft' else 'Preferences'
  objective = 'SFT' if kind == 'rft' else 'DPO'
  return [f'gin/run/{"sft" if kind == "rft" else "dpo"}_tiny.gin'], [
      f'cfg.Data.source = @cfg.{source}()', f'cfg.{source}.glob = {str(out)!r}',
      f'cfg.{objective}.start_from = {str(start)!r}', 'cfg.Data.validation_fraction = 0.05',
      'cfg.Train.num_steps = 100', 'cfg.Train.eval_every = 100', 'cfg.Checkpoint.every = 100']
