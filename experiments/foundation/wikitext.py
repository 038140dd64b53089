"""WikiText-2 bits per byte of the `small` model: full precision against W1.58A8 and W1.58A4.

    python experiments/foundation/wikitext.py --data ../shared/data/text-wikitext2

Each run is the product's own training loop at the same token budget, in a process of its
own; finished ones are kept, so the command may be interrupted and repeated. Arms differ in
`Model.quant` and in the peak learning rate, which is tuned for each arm alone: with a seed
that is not reported and the start of the validation text, the rate is doubled or halved
until the best of the rates tried has a worse neighbour on either side. W1.58A4 is trained at
4 bits from the first step (BitNet v2 trains at 8 bits first). The tokenizer is trained on
the training text; bits per byte are over the whole validation text. Results go to
results/wikitext.json and results/wikitext.png.
"""

import argparse
import dataclasses
import json
import multiprocessing
from pathlib import Path
import shutil
import statistics
import sys
from typing import NamedTuple

HERE = Path(__file__).parent
RESULTS = HERE / 'results'
BATCH, LENGTH, VOCAB = 16, 256, 1024
# Tuning starts at the first two rates and scores on the first batches of the validation text.
FIRST_RATES, TUNING_SEED, TUNING_BATCHES = (4e-3, 8e-3), 1000, 16
# Student's t for a 95 % interval of a mean, by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def arms() -> dict:
  from jaxrl_pt.config import Quant
  return {
      'full precision': Quant(),
      'W1.58A8': Quant('ternary', 'int8'),
      'W1.58A4': Quant('ternary', 'int4'),
      'W1.58A4 + Hadamard': Quant('ternary', 'int4', hadamard=True),
  }


def small(quant=None):
  """The shape of gin/model/small.gin, about 2.6M parameters."""
  from jaxrl_pt import config as cfg
  return cfg.Model(num_layers=6, d_model=192, d_ff=512, num_heads=6, num_kv_heads=2, head_dim=32,
                   vocab_size=VOCAB, activation='relu2', sub_norm=True,
                   quant=quant or cfg.Quant())


class Trial(NamedTuple):
  """One training run; `eval_batches` 0 is the whole validation text."""

  arm: str
  seed: int
  rate: float
  num_steps: int
  eval_batches: int = 0

  def path(self, work: Path) -> Path:
    """Where its result is kept."""
    name = f'{self.arm.replace(" ", "_")}-{self.seed}-{self.rate:g}-{self.num_steps}'
    return work / f'{name}.json'


def make_run(data: Path, cache: Path, trial: Trial):
  """The run of a trial."""
  from jaxrl_pt import config as cfg
  document = r'^ = [^=].* = $'
  steps = trial.num_steps
  schedule = cfg.TwoStage(trial.rate, trial.rate * 2 / 3, warmup_steps=max(1, steps // 20))
  return cfg.Run(
      seed=trial.seed,
      model=small(arms()[trial.arm]),
      data=cfg.Data(cfg.TextFiles(str(data / 'train.txt.gz'), document), cfg.TrainedBPE(VOCAB),
                    LENGTH, validation_glob=str(data / 'valid.txt'),
                    cache_dir=str(cache)),
      objective=cfg.NextToken(),
      optimizer=cfg.AdamW(schedule),
      train=cfg.Train(steps, BATCH, log_every=20, eval_every=steps,
                      eval_batches=trial.eval_batches, tensorboard=False),
      checkpoint=cfg.Checkpoint(every=steps, keep=1),
      compute=cfg.Compute(unroll=0))


def train_one(data: Path, work: Path, trial: Trial) -> None:
  """Trains one run and writes what it reached to `trial.path(work)`."""
  from jaxrl_pt import metrics
  from jaxrl_pt.jobs import open as jobs
  workdir = trial.path(work).with_suffix('')
  jobs.train(make_run(data, work / 'data', trial), workdir, '')
  rows = metrics.read_rows(workdir / 'metrics.jsonl')
  curve = [[r['step'], r['loss']] for r in rows if r['step'] % 10 == 0 or r['step'] == 1]
  last = rows[-1]
  result = {'arm': trial.arm, 'seed': trial.seed, 'rate': trial.rate,
            'bits_per_byte': last['validation/bits_per_byte'],
            'nats_per_token': last['validation/loss'], 'steps': last['step'], 'curve': curve}
  trial.path(work).write_text(json.dumps(result))
  shutil.rmtree(workdir)


def result_of(data: Path, work: Path, trial: Trial) -> dict:
  """What a trial reached: read if it is there, else trained in a child process."""
  if not trial.path(work).is_file():
    child = multiprocessing.get_context('spawn').Process(target=train_one,
                                                         args=(data, work, trial))
    child.start()
    child.join()
    if child.exitcode:
      sys.exit(f'{trial} failed with exit code {child.exitcode}')
  return json.loads(trial.path(work).read_text())


def tune(data: Path, work: Path, arm: str, num_steps: int) -> dict[float, float]:
  """Bits per byte by peak learning rate; the best rate is neither the largest nor smallest."""
  tried: dict[float, float] = {}
  wanted = list(FIRST_RATES)
  while wanted:
    for rate in wanted:
      trial = Trial(arm, TUNING_SEED, rate, num_steps, TUNING_BATCHES)
      tried[rate] = result_of(data, work, trial)['bits_per_byte']
    best = min(tried, key=tried.__getitem__)
    wanted = [rate for rate in (best / 2, best * 2) if rate not in tried]
  return dict(sorted(tried.items()))


def summarise(results: list[dict]) -> list[dict]:
  """Mean and 95 % interval per arm, and the paired difference from full precision."""
  rows = []
  by_arm = {arm: {r['seed']: r['bits_per_byte'] for r in results if r['arm'] == arm}
            for arm in dict.fromkeys(r['arm'] for r in results)}
  reference = by_arm['full precision']
  for arm, values in by_arm.items():
    difference = [v - reference[s] for s, v in values.items()]
    rates = {r['rate'] for r in results if r['arm'] == arm}
    rows.append({'arm': arm, 'peak_rate': rates.pop(),
                 'bits_per_byte': interval(list(values.values())),
                 'minus_full_precision': interval(difference), 'seeds': sorted(values)})
  return rows


def interval(values: list[float]) -> dict:
  mean = statistics.fmean(values)
  if len(values) < 2:
    return {'mean': mean, 'half_width_95': None}
  error = statistics.stdev(values) / len(values) ** 0.5
  return {'mean': mean, 'half_width_95': T_95[len(values) - 1] * error}


def plot(results: list[dict], summary: list[dict]) -> None:
  from matplotlib.figure import Figure
  figure = Figure(figsize=(10, 4), layout='constrained')
  curves, bars = figure.subplots(1, 2)
  for index, row in enumerate(summary):
    mine = [r for r in results if r['arm'] == row['arm']]
    steps = [s for s, _ in mine[0]['curve']]
    loss = [statistics.fmean(r['curve'][i][1] for r in mine) for i in range(len(steps))]
    curves.plot([s * BATCH * LENGTH / 1e6 for s in steps], loss, label=row['arm'],
                color=f'C{index}', linewidth=1.2)
    bars.errorbar([index], [row['bits_per_byte']['mean']],
                  yerr=[row['bits_per_byte']['half_width_95'] or 0.0], fmt='o', capsize=4,
                  color=f'C{index}')
    bars.plot([index + 0.15] * len(mine), [r['bits_per_byte'] for r in mine], '.',
              color=f'C{index}', alpha=0.5)
  curves.set(xlabel='training tokens, millions', ylabel='training loss, nats per token',
             ylim=(None, 6.0), title='WikiText-2 training, mean over seeds')
  curves.legend()
  bars.set(ylabel='validation bits per byte', xlim=(-0.5, len(summary) - 0.5),
           title='Validation: mean, 95 % interval, seeds')
  bars.set_xticks(range(len(summary)), [r['arm'].replace(' + ', '\n+ ') for r in summary])
  for axes in (curves, bars):
    axes.grid(alpha=0.3)
  figure.savefig(RESULTS / 'wikitext.png', dpi=130)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', type=Path, required=True, help='folder of train.txt.gz, valid.txt')
  parser.add_argument('--work', type=Path, default=Path('runs/wikitext'))
  parser.add_argument('--steps', type=int, default=160)
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  args = parser.parse_args()
  args.work.mkdir(parents=True, exist_ok=True)
  tuning = {arm: tune(args.data, args.work, arm, args.steps) for arm in arms()}
  results = [result_of(args.data, args.work,
                       Trial(arm, seed, min(tried, key=tried.__getitem__), args.steps))
             for seed in args.seeds for arm, tried in tuning.items()]
  summary = summarise(results)
  from jaxrl_pt import params
  from jaxrl_pt.models import transformer
  optimizer = make_run(Path('data'), Path('cache'),
                       Trial('full precision', 0, FIRST_RATES[0], args.steps)).optimizer
  (RESULTS / 'wikitext.json').write_text(json.dumps({
      'command': f'python experiments/foundation/wikitext.py --data DIR --steps {args.steps}',
      'parameters': params.count(transformer.build(small()).specs),
      'training_tokens': args.steps * BATCH * LENGTH,
      'optimizer of the first tuning run': dataclasses.asdict(optimizer), 'batch': BATCH,
      'length': LENGTH, 'vocabulary': VOCAB, 'summary': summary,
      'bits per byte by peak learning rate, tuning seed': tuning, 'runs': results},
      indent=1) + '\n')
  plot(results, summary)
  for row in summary:
    value, difference = row['bits_per_byte'], row['minus_full_precision']
    print(f'{row["arm"]:22s} {value["mean"]:.4f} ± {value["half_width_95"] or 0:.4f} bits/byte, '
          f'{difference["mean"]:+.4f} ± {difference["half_width_95"] or 0:.4f} against full '
          f'precision, peak rate {row["peak_rate"]:g}')


if __name__ == '__main__':
  main()
