"""Every field of every setting at its edges, through the command line: a run, or one sentence."""

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args, get_origin

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import jax
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt.jobs import autoencoding, diffusion, game_rl
from jaxrl_pt.jobs import open as jobs
from jaxrl_pt.main import main
from jaxrl_pt.parallel import memory, rules
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.run import session as sessions
from tests import random_config
from tests.test_config import VALID

# As gin writes them: 1e309 is infinite to Python.
NUMBERS = ['-1', '0', '1', '2', '3', str(2**31 - 1), str(2**31), str(2**63), '9' * 400, '9' * 5000,
           '0x' + 'f' * 400, '-0.0', '5e-324', '1e-300', '1e-12', '0.5', '0.9999999', '1.0', '1e30',
           '1e38', '1e308', '1e309', '-1e309', '1j']
TEXTS = [repr(text) for text in ('', 'a', 'a\0b', '\ud800', '\ufeffa', '{prompt}', 'x' * 5000, '%x',
                                 '@y()', '../..', 'a:b', '/', '~', '[', '\n', 'nowhere/*.txt')]
OTHERS = ['None', 'True', "'x'", '3', '()', '(1,)', "('a', 'b')", '[[]]', '{}', "{'a': 1}",
          '[' * 2000 + ']' * 2000, '@cfg.Bytes()', '@cfg.Bytes', '@a/cfg.ConstantRate()',
          '@cfg.Run()', '%gin.REQUIRED', '%nothing', '(0.5, 1e309, 2)', '[0.1, 0.2, 0.3]',
          '(1e309,)', f'({2**63},)', '(-1,)']
# Where a value decides what is opened, the files are opened too (seqio's load TensorFlow).
READS = (cfg.TextFiles, cfg.Jsonl, cfg.Parquet, cfg.ArrayRecord, cfg.HuggingFaceDataset,
         cfg.HuggingFaceTokenizer, cfg.SentencePiece, cfg.TrainedBPE)


def edges(kind: Any) -> list[str]:
  """Values for a field of that type, most of them with a right type and a wrong size."""
  if kind in (int, float):
    return [*NUMBERS, *OTHERS[:3]]
  if kind is str:
    return [*TEXTS, *OTHERS[:4]]
  if kind is bool or get_origin(kind) is None:
    return OTHERS
  return [*OTHERS, *(repr(x) for x in get_args(kind) if isinstance(x, str))]


@dataclasses.dataclass
class Opened:
  """What the command would have trained."""

  run: cfg.Run | None = None


@pytest.fixture(scope='module')
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp('corpus')
  for n in range(40):
    (folder / f'{n}.txt').write_text(f'{n} words of a document ' * (1 + n % 3))
  return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Opened:
  """In place of the job: all that a job checks before it reads data or compiles."""
  found = Opened()
  monkeypatch.chdir(tmp_path)  # Some edges are names of folders that can be written.

  def open_run(run: cfg.Run, workdir: Path, text: str, allow: frozenset[str]) -> None:
    match run.objective:
      case cfg.Diffusion():
        diffusion.check_fits(run)
      case cfg.Autoencoding():
        autoencoding.check_fits(run)
      case cfg.GameRL():
        game_rl.check_fits(run)
      case _:
        memory.check_fits(run)
    rules.check_divides(run, make_mesh(run.mesh))
    if isinstance(run.objective, cfg.OfGames):
      pass
    elif isinstance(run.data.source, READS) or isinstance(run.data.tokenizer, READS):
      sessions.open_session(run, workdir, text, allow=allow)
    found.run = run

  monkeypatch.setattr(jobs, 'train', open_run)
  return found


def complaint(capfd: pytest.CaptureFixture[str], *argv: str) -> str:
  """The sentence of a refusal, '' where the command has run."""
  code = main(['train', *argv])
  out, err = capfd.readouterr()
  assert code in (0, 2), (argv, err)
  if code == 2:
    assert out == '' and err.startswith('jaxrl-pt: ') and err.count('\n') == 1, (argv, err)
    assert len(err) < 12_000 and 'Traceback' not in err, err
  else:
    assert err == '', err
  return err


@pytest.mark.parametrize('kind', sorted(random_config.OWNERS, key=lambda kind: kind.__name__))
@settings(max_examples=3, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_field_at_an_edge_is_run_or_refused_in_one_sentence(
    kind, data, opened, corpus, capfd, tmp_path):
  fields = dataclasses.fields(kind)
  if not fields:
    return
  base = random_config.holding(kind(**VALID[kind]))
  if isinstance(base.data, cfg.Data) and isinstance(base.data.source, cfg.PythonStdlib):
    base = dataclasses.replace(base, data=dataclasses.replace(
        base.data, source=cfg.TextFiles(f'{corpus}/*.txt')))
  field = data.draw(st.sampled_from(fields))
  value = data.draw(st.sampled_from(edges(field.type)))
  opened.run = None
  (tmp_path / 'run.gin').write_text(gin_bindings.dump(base), encoding='utf-8')
  error = complaint(
      capfd, '--gin_file', str(tmp_path / 'run.gin'), '--workdir', str(tmp_path / 'w'),
      '--gin_bindings', f'cfg.{kind.__name__}.{field.name} = {value}')
  assert (opened.run is None) == bool(error)
  if opened.run is not None:
    assert gin_bindings.resolve([], [gin_bindings.dump(opened.run)])[0] == opened.run


# Settings that the checks let through, each of which once ended in a traceback or a hang.
EXTREMES = {
    'pretraining': (cfg.NextToken(), [
        'cfg.Compute.unroll = 2147483647', 'cfg.Compute.loss_chunk = 2147483647',
        'cfg.AdamW.b1 = 0.9999999', 'cfg.AdamW.eps = 1e-30', 'cfg.AdamW.clip_norm = 1e30',
        'cfg.AdamW.weight_decay = 1e30', 'cfg.ConstantRate.learning_rate = 1e-12',
        'cfg.ConstantRate.warmup_steps = 2147483647', 'cfg.Train.num_steps = 2147483647',
        'cfg.Model.rope_theta = 1e30', 'cfg.Model.norm_epsilon = 0']),
    'reinforcement': (cfg.RL('a', cfg.Problems(cfg.Arithmetic(9)), cfg.LengthVerifier(1, 2)), [
        'cfg.Sampler.temperature = 1e-6', 'cfg.Sampler.temperature = 1e6',
        'cfg.Sampler.top_k = 2147483647', 'cfg.Sampler.top_p = 5e-324',
        'cfg.Sampler.min_p = 5e-324', 'cfg.Sampler.banned = (2147483647,)',
        'cfg.Rollouts.group_size = 2', 'cfg.Rollouts.num_prompts = 1',
        'cfg.Algorithm.entropy_coef = 1e30']),
}


@pytest.mark.parametrize('name', EXTREMES)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_programs_of_an_extreme_run_can_be_traced(name, data):
  objective, bindings = EXTREMES[name]
  train = cfg.Train(4) if isinstance(objective, cfg.RL) else cfg.Train(4, 2)
  base = cfg.Run(**{**VALID[cfg.Run], 'objective': objective, 'train': train})
  chosen = data.draw(st.lists(st.sampled_from(bindings), min_size=len(bindings) - 2, unique=True))
  run, _ = gin_bindings.resolve([], [gin_bindings.dump(base), *chosen])
  for program in jobs.programs(run, make_mesh(run.mesh)):
    result = jax.eval_shape(program.run, *program.args)
    assert all(math.prod(x.shape) >= 0 for x in jax.tree.leaves(result))


def test_a_run_that_cannot_fit_says_what_takes_how_much(tmp_path, capfd):
  base = ['--gin_file', 'gin/run/opo_tiny.gin', '--workdir', str(tmp_path / 'w')]
  error = complaint(capfd, *base, '--gin_bindings', 'cfg.Rollouts.num_prompts = 1000000')
  assert 'A step of this run does not fit' in error and 'Make Rollouts smaller' in error
  error = complaint(capfd, *base[:1], 'gin/run/pretrain_tiny.gin', *base[2:], '--gin_bindings',
                    'cfg.Model.num_layers = 4096', '--gin_bindings', 'cfg.Model.d_ff = 1048576')
  assert 'Make Model smaller' in error and 'TiB' in error
  error = complaint(capfd, *base[:1], 'gin/run/pretrain_tiny.gin', *base[2:], '--gin_bindings',
                    'cfg.Train.batch_size = 4194304')
  assert 'Make Train.batch_size smaller' in error
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('argv, expected', [
    (('--workdir', 'a\0b'), 'expected a path'),
    (('--workdir', 'x' * 5000), 'cannot be written'),
    (('--workdir', '/proc/nowhere'), 'cannot be written')])
def test_a_work_directory_at_an_edge(argv, expected, capfd):
  assert expected in complaint(capfd, '--gin_file', 'gin/run/pretrain_tiny.gin', *argv)
