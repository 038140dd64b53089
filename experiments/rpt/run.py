"""Does Reinforcement Pre-Training (2506.08007) lift next-token accuracy where one pass fails?

    python experiments/rpt/run.py --data ../shared/data

Two corpora: modular chains (synthetic.py), and the solutions of GSM8K (solutions.py). Seeds
that have been run are kept in the work directory, so the command may be interrupted and
repeated. Results go to results/rpt.json and results/*.png; README.md reads them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import solutions
import synthetic

from jaxrl_pt.scaling import fit
from jaxrl_pt.scaling.seeds import interval

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # The backend comes first.

HERE = Path(__file__).parent
RESULTS = HERE / 'results'
SPLITS = ('easy', 'medium', 'hard')


def paired(seeds: list[dict], of: Any, minus: Any) -> dict[str, float]:
  """The difference of two measures, seed by seed."""
  return interval([of(s) - minus(s) for s in seeds])


def informative_share(rows: list[dict]) -> float:
  """Share of groups whose advantage is not zero, over some steps."""
  return float(np.mean([1 - row['zero_advantage_groups'] for row in rows]))


# --- The synthetic corpus -----------------------------------------------------------


def scaling(seeds: list[dict]) -> dict[str, Any]:
  """P(C) = A/C^α + P* of RPT's sampled accuracy, with the last point held out."""
  config, rollouts = synthetic.SETTING, synthetic.ROLLOUTS
  # At the start nothing has been spent and the law is not defined: marked steps alone.
  compute = np.array(synthetic.MARKED) * synthetic.arms.rollout_flops(config, rollouts)
  report = {'compute_flops': compute.tolist()}
  for split in SPLITS:
    runs = np.array([[score[split] for score in s['curve'][1:]] for s in seeds])
    law = fit.fit(compute, runs)
    last = fit.forecast_last(compute, runs)
    edges = lambda x: [round(x.low, 4), round(x.high, 4)]
    report[split] = {
        'exponent': round(law.law.exponent, 4), 'exponent_95': edges(law.exponent),
        'limit': round(law.law.limit, 4), 'limit_95': edges(law.limit),
        'amplitude': law.law.amplitude, 'r_squared': round(law.r_squared, 4),
        'last_predicted': round(last.predicted, 4), 'last_measured': round(last.measured, 4),
        'last_error': round(last.error, 4), 'last_interval_95': edges(last.interval),
        'seed_spread': round(last.spread, 4), 'mean': runs.mean(0).round(4).tolist()}
  return report


def summarise_synthetic(seeds: list[dict]) -> dict[str, Any]:
  """Claims and their intervals."""
  # Of some number of steps a seed may have no position.
  kinds = [kind for kind in seeds[0]['counts'] if all(kind in s['counts'] for s in seeds)]
  table = {}
  for kind in kinds:
    table[kind] = {
        'NTP argmax': interval([s['ntp_argmax'][kind] for s in seeds]),
        'NTP argmax, compute-matched': interval([s['ntp_matched_argmax'][kind] for s in seeds])}
    for arm in ('warm', 'rpt', 'shuffled', 'unfiltered'):
      for how in ('greedy', 'sampled', 'argmax'):
        table[kind][f'{arm} {how}'] = interval([s[arm][how][kind] for s in seeds])
  matched = lambda kind: lambda s: s['ntp_matched_argmax'][kind]
  arm = lambda name, how, kind: lambda s: s[name][how][kind]
  lift = {kind: {
      'rpt greedy − matched argmax': paired(seeds, arm('rpt', 'greedy', kind), matched(kind)),
      'rpt sampled − matched argmax': paired(seeds, arm('rpt', 'sampled', kind), matched(kind)),
      'rpt − warm, greedy': paired(seeds, arm('rpt', 'greedy', kind), arm('warm', 'greedy', kind)),
      'rpt − warm, sampled': paired(seeds, arm('rpt', 'sampled', kind),
                                    arm('warm', 'sampled', kind)),
      'shuffled − warm, sampled': paired(seeds, arm('shuffled', 'sampled', kind),
                                         arm('warm', 'sampled', kind))}
          for kind in (*SPLITS, 'filler')}
  informative = {}
  for window, stop in (('first_steps', synthetic.SHORT), ('all_steps', synthetic.RPT_STEPS)):
    filtered, all_positions = (
        np.array([informative_share(s['rows'][name][:stop]) for s in seeds])
        for name in ('rpt', 'unfiltered'))
    informative[window] = {'filter': interval(filtered), 'no filter': interval(all_positions),
                           'difference': interval(filtered - all_positions)}
  return {'accuracy': table, 'lift': lift, 'informative_groups': informative,
          'filter_keeps': interval([s['filter_keeps'] for s in seeds]),
          'largest_mismatch': max(r['mismatch'] for s in seeds for rows in s['rows'].values()
                             for r in rows),
          'rlp': summarise_rlp(seeds), 'scaling': scaling(seeds)}


def summarise_rlp(seeds: list[dict]) -> dict[str, Any]:
  """RPT and RLP where nearly all groups are wrong."""
  tenth = lambda s, arm, key: np.mean([r[key] for r in s[arm]['rows'][:10]])
  report = {
      'rpt_all_wrong_groups_first_10_steps': interval(
          [tenth(s, 'weak_rpt', 'all_wrong') for s in seeds]),
      'reward_variance_in_groups_first_10_steps': {
          arm: interval([tenth(s, arm, 'advantage_variance') for s in seeds])
          for arm in ('weak_rpt', 'weak_rlp')},
      'silent_groups_first_10_steps': {
          arm: interval([tenth(s, arm, 'zero_advantage_groups') for s in seeds])
          for arm in ('weak_rpt', 'weak_rlp')}}
  rollouts = synthetic.WEAK_ROLLOUTS.num_prompts * synthetic.WEAK_ROLLOUTS.group_size
  for kind in ('hard', 'steps_5', 'steps_6'):
    for unit in ('chance', 'nats'):
      values = {arm: np.array([[score[unit][kind] for score in s[arm]['curve']] for s in seeds])
                for arm in ('weak_rpt', 'weak_rlp')}
      row = {'start': interval(values['weak_rpt'][:, 0])}
      for place, step in enumerate(synthetic.WEAK_MARKED, start=1):
        rpt, rlp = (values[arm][:, place] - values[arm][:, 0] for arm in values)
        row[f'gain after {step * rollouts} rollouts'] = {
            'rpt': interval(rpt), 'rlp': interval(rlp), 'rlp − rpt': interval(rlp - rpt)}
      report[f'{kind}, {unit} of the truth'] = row
  return report


def plot_synthetic(seeds: list[dict], summary: dict[str, Any]) -> None:
  """Accuracy by steps, the curve with its law, RPT against RLP."""
  figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4))
  steps = [k for k in range(1, 7) if f'steps_{k}' in summary['accuracy']]
  for label, key in (('NTP argmax, compute-matched',) * 2, ('warm start, sampled', 'warm sampled'),
                     ('RPT, sampled', 'rpt sampled'), ('RPT, greedy', 'rpt greedy'),
                     ('RPT, argmax without thought', 'rpt argmax'),
                     ('shuffled truth, sampled', 'shuffled sampled')):
    cells = [summary['accuracy'][f'steps_{k}'][key] for k in steps]
    left.errorbar(steps, [c['mean'] for c in cells], [c['half_width_95'] for c in cells],
                  marker='o', markersize=3, capsize=2, label=label)
  left.axhline(1 / synthetic.corpus.NUM_STATES, color='grey', linewidth=0.8, linestyle=':')
  left.set(xlabel='serial steps of the result', ylabel='next-token accuracy', ylim=(0, 1.02))
  left.legend(fontsize=6, loc='upper center', bbox_to_anchor=(0.5, -0.14), ncol=3)
  law = summary['scaling']
  compute = np.array(law['compute_flops'])
  for split in SPLITS:
    row = law[split]
    line, = middle.plot(compute, row['mean'], 'o', markersize=4, label=split)
    dense = np.geomspace(compute[0], compute[-1], 100)
    curve = fit.PowerLaw(row['amplitude'], row['exponent'], row['limit'])
    middle.plot(dense, curve(dense), color=line.get_color(), linewidth=1)
    middle.plot(compute[-1], row['last_predicted'], 'x', color=line.get_color())
  middle.set(xscale='log', xlabel='FLOPs of RPT', ylabel='sampled accuracy',
             title='law of all points; × forecast without the last')
  middle.legend(fontsize=7)
  places = np.array((0, *synthetic.WEAK_MARKED)) * synthetic.WEAK_ROLLOUTS.num_prompts
  for arm, label in (('weak_rpt', 'RPT'), ('weak_rlp', 'RLP')):
    values = np.array([[score['nats']['hard'] for score in s[arm]['curve']] for s in seeds])
    line, = right.plot(places * synthetic.WEAK_ROLLOUTS.group_size, np.median(values, 0),
                       marker='o', label=label)
    right.plot(places * synthetic.WEAK_ROLLOUTS.group_size, values.T, color=line.get_color(),
               linewidth=0.6, alpha=0.5)
  right.set(xlabel='rollouts', ylabel='log p of the truth after a thought, nats, hard',
            title='weak warm start: seeds and median')
  right.legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(RESULTS / 'synthetic.png', dpi=110)


# --- Solutions ------------------------------------------------------------------------


def summarise_solutions(seeds: list[dict]) -> dict[str, Any]:
  """Accuracies by arm and kind of position, and the paired lift."""
  arms = ('ntp_argmax', 'ntp_matched_argmax', 'warm_greedy', 'rpt_greedy', 'warm_sampled',
          'rpt_sampled', 'rpt_argmax')
  kinds = [*SPLITS, 'result']
  return {
      'positions': {kind: seeds[0]['counts'][kind] for kind in kinds},
      'accuracy': {kind: {arm: interval([s[arm][kind] for s in seeds]) for arm in arms}
                   for kind in kinds},
      'rpt greedy − matched argmax': {
          kind: paired(seeds, lambda s, k=kind: s['rpt_greedy'][k],
                       lambda s, k=kind: s['ntp_matched_argmax'][k]) for kind in kinds},
      'rpt − warm, sampled': {
          kind: paired(seeds, lambda s, k=kind: s['rpt_sampled'][k],
                       lambda s, k=kind: s['warm_sampled'][k]) for kind in kinds},
      'reward_first_last_10': [[round(float(np.mean([r['reward'] for r in part])), 4)
                                for part in (s['rows'][:10], s['rows'][-10:])] for s in seeds]}


def kept(path: Path, compute: Any) -> dict:
  """What `compute` gives, from `path` if it was run before."""
  if not path.is_file():
    path.write_text(json.dumps(compute()))
  return json.loads(path.read_text())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', type=Path, default=HERE.parents[1] / '../shared/data')
  parser.add_argument('--work', type=Path, default=Path('runs/rpt'))
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--only_seed', type=int, help='runs one synthetic seed and writes nothing '
                      'but its file in --work, for several at once')
  parser.add_argument('--solution_seeds', type=int, default=2)
  args = parser.parse_args()
  args.work.mkdir(parents=True, exist_ok=True)
  RESULTS.mkdir(exist_ok=True)
  tuned = lambda: kept(args.work / 'synthetic-control.json', synthetic.tune_control)
  if args.only_seed is not None:
    kept(args.work / f'synthetic-{args.only_seed}.json',
         lambda: synthetic.run_seed(args.only_seed, tuned))
    return
  report: dict[str, Any] = {'command': 'python experiments/rpt/run.py --data DIR'}
  seeds = [kept(args.work / f'synthetic-{s}.json', lambda s=s: synthetic.run_seed(s, tuned))
           for s in range(args.seeds)]
  report['synthetic'] = {'seeds': len(seeds), 'control_steps': seeds[0]['control_steps'],
                         'control': tuned(),
                         'held_out': {'documents': [s['held_out_documents'] for s in seeds],
                                      'positions': [s['counts'] for s in seeds]},
                         **summarise_synthetic(seeds)}
  plot_synthetic(seeds, report['synthetic'])
  if args.solution_seeds and solutions.is_there(args.data):
    rate = kept(args.work / 'solutions-control.json', lambda: solutions.tune_control(args.data))
    runs = [kept(args.work / f'solutions-{s}.json',
                 lambda s=s: solutions.run_seed(args.data, s, rate['rate']))
            for s in range(args.solution_seeds)]
    report['solutions'] = {'seeds': len(runs), 'control': rate, **summarise_solutions(runs)}
  else:
    print(f'The part on real text is left out: no seeds, or no math-gsm8k in {args.data}.')
  (RESULTS / 'rpt.json').write_text(json.dumps(report, indent=1, ensure_ascii=False) + '\n')
  print(json.dumps(report['synthetic']['lift'], indent=1, ensure_ascii=False))


if __name__ == '__main__':
  main()
