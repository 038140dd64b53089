"""HFT-RFT and HFT-DPO: data from the HFT policy's own answers to the prompts that HGPO gets.

The paper's baselines (LHRM 2505.14631, section 4.1) from two answers in each mode: the best of the
four to be learned, or the best of the better mode to be preferred to the worst of the worse one.
"""

import json
from pathlib import Path

import measure
import numpy as np

from jaxrl_pt.data import problems
from jaxrl_pt.run.policy import load_policy

NUM_PROMPTS, EACH = 3200, 2  # as many prompts as 200 steps of 16
MARGIN = 0.2  # δ of HGPO
STEPS = 100


def prepare(kind: str, start: Path, out: Path, seed: int) -> list[str]:
  """Writes the data, and returns the arguments with which `train` learns from them."""
  policy = load_policy(start)
  training, _ = problems.load(measure.SUMS)
  draw = np.random.default_rng(seed)
  chosen = [training[i] for i in draw.choice(len(training), NUM_PROMPTS, replace=False)]
  answers, tokens = measure.answering(policy, 64, EACH)(policy.params, chosen, 1000 * seed)
  tokenizer = policy.session.data.tokenizer
  text = lambda n, mode, i: tokenizer.decode(
      [t for t in tokens[n, mode * EACH + i].tolist() if t >= 0 and t not in tokenizer.stop_ids])
  lines = []
  for n, problem in enumerate(chosen):
    score = answers['correct'][n]
    better = int(score[0].mean() <= score[1].mean() + MARGIN)
    best, worst = int(score[better].argmax()), int(score[1 - better].argmin())
    if kind == 'dpo':
      lines.append({'prompt': problem.prompt, 'chosen': text(n, better, best),
                    'rejected': text(n, 1 - better, worst)})
    elif score[better, best]:
      lines.append({'prompt': problem.prompt, 'completion': text(n, better, best)})
  out.write_text(''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8')
  source, objective, gin = (('Preferences', 'DPO', 'dpo') if kind == 'dpo' else
                            ('Conversations', 'SFT', 'sft'))
  args = ['--gin_file', f'gin/run/{gin}_tiny.gin']
  for binding in (f'cfg.Data.source = @cfg.{source}()', f'cfg.{source}.glob = {str(out)!r}',
                  f'cfg.{objective}.start_from = {str(start)!r}', f'cfg.Run.seed = {seed}',
                  'cfg.Data.validation_fraction = 0.0', f'cfg.Train.num_steps = {STEPS}',
                  f'cfg.Train.eval_every = {STEPS}', f'cfg.Checkpoint.every = {STEPS}',
                  'cfg.Train.tensorboard = False'):
    args += ['--gin_bindings', binding]
  return args
