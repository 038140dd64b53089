"""What is trained and asked: arms, sizes, and the commands of `jaxrl-pt` that do both."""

from collections.abc import Sequence
import dataclasses
from dataclasses import dataclass
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

from jaxrl_pt.scaling import runs
from jaxrl_pt.scaling.seeds import finished_rows

ROOT = Path(__file__).resolve().parents[2]
TRIED = 0.001, 0.002, 0.004
AT_ONCE = 1, 4, 16, 64  # games of which frame times are measured
SAMPLING_STEPS = 8  # With 4 too many frames of the trained mini model cannot be read.
SEED_OF_RATES = 100  # Rates are chosen on this seed, which no result has.
RATE_STEPS = 500  # The trainings that choose a rate are so long.


@dataclass(frozen=True)
class Size:
  """How much is trained and measured.

  steps: of every training, rates among them; vae_steps: of the recurrent rival's autoencoder.
  episodes: held-out games of an evaluation.
  frames, delay_frames, drift_frames: drawn by the model in each of them.
  edit: the last frame before an edit.
  """

  steps: int = 2000
  vae_steps: int = 1000
  episodes: int = 64
  frames: int = 48
  delay_frames: int = 96
  drift_frames: int = 500
  edit: int = 24


FULL, SMOKE = Size(), Size(12, 8, 6, 12, 14, 20, 6)


@dataclass(frozen=True)
class Arm:
  """A model that is trained apart from all others.

  values, map: which of the two modules it is trained and played with. The parameters of an arm
    without one are there all the same (`cfg.Conditions`), so that they are as many.
  rate: the peak of its learning rate, its best of TRIED (part `rate`).
  shift: of the levels from which it draws; 0 leaves it to the run. It was chosen for `none` and
    `both` in worlds that no result has; other arms of Traveler take that of the one with the same
    values, and other games have not been tried.
  game: traveler, pong or pacman.
  run: the gin file of its training.
  changes: of its settings.
  """

  values: bool
  map: bool
  rate: float = 0.002
  shift: float = 0.1
  game: str = 'traveler'
  run: str = 'maag_tiny'
  changes: tuple[str, ...] = ()


def _context(num_frames: int) -> Arm:
  return Arm(False, False, shift=0.02, changes=(f'FrameHistory.num_frames = {num_frames}',))


def _other(game: str, config: str, values: bool, has_map: bool) -> Arm:
  return Arm(values, has_map, game=game, changes=(f'Trajectories.game = @cfg.{config}()',))


FOUR = {'none': Arm(False, False, shift=0.02), 'numerical': Arm(True, False),
        'spatial': Arm(False, True, shift=0.02), 'both': Arm(True, True)}
# The recurrent rival learns 192 frames a step, the others 64, and needs whole episodes for it.
RIVALS = {'none_8': _context(8), 'none_32': _context(32),
          'recurrent': Arm(False, False, 0.001, 0.0, run='maag_recurrent_tiny', changes=(
              'Trajectories.num_frames = 48', 'Train.batch_size = 4'))}
GAMES = {'pong_none': _other('pong', 'Pong', False, False),
         'pong_numerical': _other('pong', 'Pong', True, False),
         'pacman_none': _other('pacman', 'PacMan', False, False),
         'pacman_both': _other('pacman', 'PacMan', True, True)}
ARMS = {**FOUR, **RIVALS, **GAMES}

_EVALUATIONS = {'traveler': 'maag', 'pong': 'maag_pong', 'pacman': 'maag_pacman'}


# --- Training -----------------------------------------------------------------------


def train(name: str, seed: int, root: Path, size: Size, rate: float | None = None
          ) -> dict[str, Any]:
  """Trains an arm by `jaxrl-pt train`, or goes on; a finished run is left as it is.

  Args:
    name: of the arm.
    seed: of parameters, noise, and the order of episodes.
    root: work directories lie in it.
    size: the number of steps.
    rate: the peak of the learning rate; None takes the arm's own.

  Returns:
    The rate, and the mean loss of the last tenth of the steps.
  """
  arm = ARMS[name]
  peak = arm.rate if rate is None else rate
  changes = [*_common(seed, size.steps, peak), *arm.changes, 'Diffusion.display_weight = 8.0',
             f'Diffusion.sampling_steps = {SAMPLING_STEPS}',
             f'Conditions.values = {arm.values}', f'Conditions.map = {arm.map}']
  if arm.run == 'maag_recurrent_tiny':
    changes.append(f'Diffusion.vae_from = {str(directory("vae", seed, root))!r}')
  rows = _run(arm.run, directory(name if rate is None else f'{name}-{rate:g}', seed, root),
              size.steps, changes)
  losses = [row['loss'] for row in rows[-max(1, size.steps // 10):]]
  return {'rate': peak, 'loss': round(sum(losses) / len(losses), 6)}


def train_vae(seed: int, root: Path, size: Size) -> dict[str, Any]:
  """Trains the autoencoder of the recurrent rival, as `train` does."""
  rows = _run('vae_tiny', directory('vae', seed, root), size.vae_steps,
              _common(seed, size.vae_steps, 0.003))
  return {'loss': rows[-1]['loss']}


def directory(name: str, seed: int, root: Path) -> Path:
  """The work directory of an arm."""
  return root / f'{name}-{seed}'


def _common(seed: int, steps: int, rate: float) -> list[str]:
  return [f'Run.seed = {seed}', f'Train.num_steps = {steps}', f'Train.eval_every = {steps}',
          f'Checkpoint.every = {max(50, steps // 8)}', 'Checkpoint.keep = 1',
          f'Cosine.peak_rate = {rate}', f'Cosine.end_rate = {rate / 10}',
          f'Cosine.warmup_steps = {min(50, steps // 4)}']


def _run(gin: str, workdir: Path, steps: int, changes: Sequence[str]) -> list[dict[str, Any]]:
  """The rows of a run's metrics, of which there is one for every step."""
  rows = runs.train(str(ROOT / 'gin' / 'run' / f'{gin}.gin'), workdir,
                    [f'cfg.{change}' for change in changes])
  if rows[-1]['step'] != steps:
    raise SystemExit(f'{workdir} holds {rows[-1]["step"]} of {steps} steps: see {workdir}.log')
  return rows


# --- Measuring ----------------------------------------------------------------------


def evaluate(arm: Arm, workdir: Path, name: str, size: Size, changes: Sequence[str] = (), *,
             frames: int = 0) -> dict[str, Any]:
  """What `jaxrl-pt eval` finds of a model that plays held-out games with the modules of an arm.

  It writes a report with films to evaluations/<name>.* of the work directory; one that is there is
  read and not made again.

  Args:
    arm: its game and modules.
    workdir: of the trained model.
    name: of the evaluation.
    size: of the evaluation.
    changes: of its settings.
    frames: drawn by the model; 0 takes size.frames.
  """
  output = workdir / 'evaluations' / f'{name}.json'
  if not output.is_file():
    command = [sys.executable, '-m', 'jaxrl_pt.main', 'eval', '--workdir', str(workdir),
               '--output', str(output), *settings(arm, size, changes, frames)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(f'{workdir}.log', 'a', encoding='utf-8') as log:
      subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
  found = json.loads(output.read_text(encoding='utf-8'))
  return {name: found[name] for name in ('measures', 'by_delay', 'after_edit', 'frame_time')
          if name in found}


def settings(arm: Arm, size: Size, changes: Sequence[str], frames: int = 0) -> list[str]:
  """The flags of `jaxrl-pt eval` that say what is measured."""
  frames = frames or size.frames
  every = [f'GameEvaluation.episodes = {size.episodes}',
           f'GameEvaluation.batch_size = {size.episodes}', f'GameEvaluation.at_frame = {frames}',
           f'Trajectories.num_frames = {frames + 1}', f'MaaG.shows_counters = {arm.values}']
  if arm.shift:
    every += ['GameEvaluation.drawing = @cfg.Drawing()', f'Drawing.sampling_shift = {arm.shift}']
  if not arm.map and arm.game != 'pong':
    every.append('MaaG.map = @cfg.NoMap()')
  gin = ROOT / 'gin' / 'eval' / f'{_EVALUATIONS[arm.game]}.gin'
  return ['--gin_file', str(gin),
          *(word for change in (*every, *changes) for word in ('--gin_bindings', f'cfg.{change}'))]


def results(root: Path, size: Any) -> dict[str, Any]:
  """The results of the parts that runs.jsonl says were finished at this size, by name.

  Args:
    root: the work directory of an experiment.
    size: a dataclass, how much was trained and measured.
  """
  return {row['part']: row['result'] for row in finished_rows(root / 'runs.jsonl')
          if row['size'] == dataclasses.asdict(size)}
