"""WikiText-2 bits per byte of the `small` model: full precision against W1.58A8 and W1.58A4.

    python experiments/foundation/wikitext.py --data ../shared/data/text-wikitext2

Each (arm, seed) is one run of the product's own training loop at the same token budget,
in a process of its own; finished ones are kept, so the command may be interrupted and
repeated. The tokenizer is trained on the training text; bits per byte are over the whole
validation text. Results go to results/wikitext.json and results/wikitext.png.
"""

import argparse
import dataclasses
import json
import multiprocessing
from pathlib import Path
import shutil
import statistics
import sys

HERE = Path(__file__).parent
RESULTS = HERE / 'results'
BATCH, LENGTH, VOCAB = 16, 256, 1024
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


def make_run(data: Path, cache: Path, arm: str, seed: int, num_steps: int):
  """The run of one arm; arms differ in nothing but `Model.quant`."""
  from jaxrl_pt import config as cfg
  from jaxrl_pt.models import presets
  document = r'^ = [^=].* = $'
  return cfg.Run(
      seed=seed,
      model=presets.small(VOCAB, arms()[arm]),
      data=cfg.Data(cfg.TextFiles(str(data / 'train.txt.gz'), document), cfg.TrainedBPE(VOCAB),
                    LENGTH, validation_glob=str(data / 'valid.txt'),
                    cache_dir=str(cache)),
      objective=cfg.NextToken(),
      optimizer=cfg.AdamW(cfg.TwoStage(4e-3, 2.7e-3, warmup_steps=max(1, num_steps // 20))),
      train=cfg.Train(num_steps, BATCH, log_every=20, eval_every=num_steps, eval_batches=0,
                      tensorboard=False),
      checkpoint=cfg.Checkpoint(every=num_steps, keep=1),
      compute=cfg.Compute(unroll=0))


def train_one(data: Path, work: Path, arm: str, seed: int, num_steps: int) -> None:
  """Trains one run and writes what it reached beside its work directory."""
  from jaxrl_pt import metrics
  from jaxrl_pt.train import pretrain
  workdir = work / f'{arm.replace(" ", "_")}-{seed}-{num_steps}'
  pretrain.train(make_run(data, work / 'data', arm, seed, num_steps), workdir, '')
  rows = metrics.read_rows(workdir / 'metrics.jsonl')
  curve = [[r['step'], r['loss']] for r in rows if r['step'] % 10 == 0 or r['step'] == 1]
  last = rows[-1]
  result = {'arm': arm, 'seed': seed, 'bits_per_byte': last['validation/bits_per_byte'],
            'nats_per_token': last['validation/loss'], 'steps': last['step'], 'curve': curve}
  result_path(work, arm, seed, num_steps).write_text(json.dumps(result))
  shutil.rmtree(workdir)


def result_path(work: Path, arm: str, seed: int, num_steps: int) -> Path:
  return work / f'{arm.replace(" ", "_")}-{seed}-{num_steps}.json'


def summarise(results: list[dict]) -> list[dict]:
  """Mean and 95 % interval per arm, and the paired difference from full precision."""
  rows = []
  by_arm = {arm: {r['seed']: r['bits_per_byte'] for r in results if r['arm'] == arm}
            for arm in dict.fromkeys(r['arm'] for r in results)}
  reference = by_arm['full precision']
  for arm, values in by_arm.items():
    difference = [v - reference[s] for s, v in values.items()]
    rows.append({'arm': arm, 'bits_per_byte': interval(list(values.values())),
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
             ylim=(None, 6.0), title='Mean over seeds')
  curves.legend()
  bars.set(ylabel='validation bits per byte', xlim=(-0.5, len(summary) - 0.5),
           title='WikiText-2 validation: mean with 95 % interval, seeds beside it')
  bars.set_xticks(range(len(summary)), [r['arm'].replace(' + ', '\n+ ') for r in summary])
  for axes in (curves, bars):
    axes.grid(alpha=0.3)
  figure.savefig(RESULTS / 'wikitext.png', dpi=130)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', type=Path, required=True, help='folder of train.txt.gz, valid.txt')
  parser.add_argument('--work', type=Path, default=Path('runs/wikitext'))
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  args = parser.parse_args()
  args.work.mkdir(parents=True, exist_ok=True)
  for seed in args.seeds:
    for arm in arms():
      if not result_path(args.work, arm, seed, args.steps).is_file():
        child = multiprocessing.get_context('spawn').Process(
            target=train_one, args=(args.data, args.work, arm, seed, args.steps))
        child.start()
        child.join()
        if child.exitcode:
          sys.exit(f'{arm}, seed {seed} failed with exit code {child.exitcode}')
  results = [json.loads(result_path(args.work, arm, seed, args.steps).read_text())
             for seed in args.seeds for arm in arms()]
  summary = summarise(results)
  from jaxrl_pt import params
  from jaxrl_pt.models import presets, transformer
  run = make_run(Path('text-wikitext2'), Path('cache'), 'W1.58A8', 0, args.steps)
  (RESULTS / 'wikitext.json').write_text(json.dumps({
      'command': f'python experiments/foundation/wikitext.py --data DIR --steps {args.steps}',
      'parameters': params.count(transformer.build(presets.small(VOCAB)).specs),
      'training_tokens': args.steps * BATCH * LENGTH,
      'optimizer': dataclasses.asdict(run.optimizer), 'batch': BATCH, 'length': LENGTH,
      'vocabulary': VOCAB, 'summary': summary, 'runs': results}, indent=1) + '\n')
  plot(results, summary)
  for row in summary:
    value, difference = row['bits_per_byte'], row['minus_full_precision']
    print(f'{row["arm"]:22s} {value["mean"]:.4f} ± {value["half_width_95"] or 0:.4f} bits/byte, '
          f'{difference["mean"]:+.4f} against full precision')


if __name__ == '__main__':
  main()
