"""The command line: parses flags, calls the command's function and reports mistakes.

Only this module and a verifier's sandbox set JAX's options, the environment and the exit code of
the process. Heavy modules are imported where they are called, so that `--help` and a mistyped flag
answer at once.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import json
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import Any

from jaxrl_pt import config as cfg
from jaxrl_pt import flags
from jaxrl_pt.errors import Preempted, UserError

_INTERRUPTED = '\njaxrl-pt: interrupted.\n'


@contextlib.contextmanager
def _importing() -> Iterator[None]:
  """Lets Ctrl-C end the process at once while modules are imported, when nothing can be lost.

  Python drops an exception that a signal raises inside one of its own callbacks, of which an import
  runs thousands, so that the command would go on as if nobody had asked it to stop.
  """
  in_main = threading.current_thread() is threading.main_thread()
  if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    yield
    return

  def end(number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(2, _INTERRUPTED.encode())
    os._exit(130)

  signal.signal(signal.SIGINT, end)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# --- Commands ---------------------------------------------------------------------


def _quickstart(args: argparse.Namespace) -> int:
  with _importing():
    from jaxrl_pt import quickstart
  quickstart.run(args.workdir, args.data)
  return 0


def _train(args: argparse.Namespace) -> int:
  with _importing():
    from jaxrl_pt import gin_bindings
  bindings = list(args.gin_bindings)
  if args.start_from is not None:
    with _importing():
      from jaxrl_pt.run import start
    bindings = [*start.bindings(args.start_from, args.gin_file, bindings), *bindings]
  run, resolved_text = gin_bindings.load(args.gin_file, bindings)
  if args.multihost:
    _join_hosts()
  with _importing():
    from jaxrl_pt.jobs import open as jobs
    from jaxrl_pt.run import places, resume
  run = places.absolute(run)
  resolved_text = gin_bindings.dump(run)
  allow = (frozenset() if args.allow_changes is None
           else resume.check_allowed(args.allow_changes))
  jobs.train(run, args.workdir, resolved_text, allow)
  return 0


def _join_hosts() -> None:
  """Joins this process with those of the cluster's other hosts.

  Raises:
    UserError: there is no cluster, or it cannot be joined.
  """
  with _importing():
    import jax
  # JAX's own service would swallow a SIGTERM that comes before training listens for it.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize()
  except (ValueError, RuntimeError) as e:
    reason = str(e).strip().split('\n', 1)[0].rstrip('.')
    raise UserError(f'--multihost found no cluster to join ({reason}): start the same command on '
                    'every host of a TPU slice or of a Slurm, Open MPI or Kubernetes job, or '
                    'leave --multihost out.') from e


def _held(args: argparse.Namespace) -> Any:
  """How the weights are held, a `policy.Held`."""
  with _importing():
    from jaxrl_pt.run import policy
  return policy.Held(args.head, args.packed)


def _sample(args: argparse.Namespace) -> int:
  drawing, reading = _drawing(args), _reading(args)
  if args.prompt is not None and args.prompt_file is not None:
    raise UserError('Give prompts as --prompt or as --prompt_file, not both.')
  prompts = args.prompt
  if prompts is None and args.prompt_file is None and not sys.stdin.isatty():
    prompts = [_read_stdin()]
  with _importing():
    from jaxrl_pt import frontends
    from jaxrl_pt.run import samples
  if args.prompt_file is not None:
    prompts = frontends.read_prompts(args.prompt_file)
  frontends.sample(
      args.workdir, prompts, step=args.step, as_json=args.json, prompt_len=1024, seed=args.seed,
      reading=samples.Reading(*reading, kv=args.kv), held=_held(args), stop=tuple(args.stop),
      drawing=drawing, thought=_thought(args), num_tokens=args.num_tokens,
      num_samples=args.num_samples)
  return 0


def _thought(args: argparse.Namespace) -> Any:
  """What the flags say of thinking, a `frontends.Thought`."""
  with _importing():
    from jaxrl_pt import frontends
  return frontends.Thought(args.thinking, args.thinking_budget, args.markers, args.no_think)


def _drawing(args: argparse.Namespace) -> dict[str, Any]:
  """The fields of `cfg.Sampler` that were given."""
  given = {name: getattr(args, name) for name in ('temperature', 'top_k', 'top_p', 'min_p')}
  given = {name: value for name, value in given.items() if value is not None}
  cfg.Sampler(**given)  # A mistake is told before the model is loaded.
  return given


def _reading(args: argparse.Namespace) -> tuple[cfg.Dense | cfg.ReSA, cfg.Drafts]:
  """How the cache is read: by sparse attention or not, with or without drafts."""
  every = None if args.resa_every is None else cfg.RefreshEvery(args.resa_every)
  given: dict[str, Any] = {name: value for name, value in (
      ('block', args.resa_block), ('active', args.resa_share), ('refresh', every))
           if value is not None}
  drafts: cfg.Drafts = cfg.NoDrafts()
  if args.lookup_drafts is not None:
    if args.resa:
      raise UserError('--lookup_drafts are checked by dense attention, which --resa replaces: '
                      'leave one of them out, or draft with --resa --resa_drafts.')
    drafts = cfg.PromptLookup(args.lookup_drafts)
  if args.resa and args.resa_drafts is not None:
    return cfg.Dense(), cfg.SparseDrafts(args.resa_drafts, cfg.ReSA(**given))
  if args.resa:
    return cfg.ReSA(**given), drafts
  if given or args.resa_drafts is not None:
    raise UserError('--resa_block, --resa_share, --resa_every and --resa_drafts do nothing without '
                    '--resa: add it.')
  return cfg.Dense(), drafts


def _chat(args: argparse.Namespace) -> int:
  drawing = _drawing(args)
  with _importing():
    from jaxrl_pt import frontends
  frontends.chat(
      args.workdir, step=args.step, prompt_len=args.prompt_len, template=args.template,
      thought=_thought(args), seed=args.seed, drawing=drawing, max_tokens=args.num_tokens,
      max_thought=args.max_thought, max_answer=args.max_answer, system=args.system,
      kv=args.kv, held=_held(args))
  return 0


def _serve(args: argparse.Namespace) -> int:
  engine = cfg.Engine(slots=args.slots, queue=args.queue, prompt_len=args.prompt_len,
                      response_len=args.response_len, kv=args.kv, steps_per_call=4)
  with _importing():
    from jaxrl_pt import frontends
  frontends.serve(
      args.workdir, step=args.step, host=args.host, port=args.port, token_file=args.token_file,
      engine=engine, max_samples=args.max_samples, template=args.template,
      thought=frontends.Thought(markers=args.markers, no_think=args.no_think), seed=args.seed,
      held=_held(args), access_log=args.access_log)
  return 0


def _read_stdin() -> str:
  try:
    return sys.stdin.buffer.read().decode('utf-8-sig').removesuffix('\n')
  except UnicodeDecodeError as e:
    raise UserError(f'Standard input is not UTF-8 text (byte {e.start}): convert it first.') from e


def _eval(args: argparse.Namespace) -> int:
  if args.tasks is not None:
    return _eval_tasks(args)
  for name in ('include_path', 'limit', 'num_fewshot', 'max_length', 'add_bos_token',
               'apply_chat_template', 'template'):
    if getattr(args, name) not in (None, False):
      raise UserError(f'--{name} does nothing without --tasks: add it, or leave --{name} out.')
  with _importing():
    from jaxrl_pt import gin_bindings
  if gin_bindings.binds('HybridAccuracy', args.gin_file, args.gin_bindings):
    return _eval_hybrid(args)
  if gin_bindings.binds('GameEvaluation', args.gin_file, args.gin_bindings):
    return _eval_game(args)
  if args.output is not None:
    raise UserError('--output does nothing without --tasks or the settings of cfg.HybridAccuracy '
                    'or cfg.GameEvaluation: add one of them, or leave --output out.')
  data = None
  if args.gin_file or args.gin_bindings:
    saved = args.workdir / 'config.gin'
    if not saved.is_file():
      raise UserError(f'{args.workdir} holds no config.gin: give the --workdir of a train run.')
    run, _ = gin_bindings.load([str(saved), *args.gin_file], args.gin_bindings)
    data = run.data
  with _importing():
    from jaxrl_pt.jobs import open as jobs
  # Notes, as of rows that were cut, are no part of the JSON.
  with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
    results = jobs.evaluate_workdir(args.workdir, step=args.step, data=data)
  if args.json:
    print(json.dumps(results, indent=2))
  else:
    for name, value in results.items():
      print(f'{name:16} {value:.4f}' if isinstance(value, float) else f'{name:16} {value}')
  return 0


def _eval_hybrid(args: argparse.Namespace) -> int:
  saved = args.workdir / 'config.gin'
  if not saved.is_file():
    raise UserError(f'{args.workdir} holds no config.gin: give the --workdir of a train run.')
  _check_files(args, 'output')
  with _importing():
    from jaxrl_pt import gin_bindings
    from jaxrl_pt.evaluation import hybrid, hybrid_report
  gin_files = list(args.gin_file)
  # A run file says all that is measured; without one it is the run of the work directory.
  if not gin_bindings.binds('Run.objective', gin_files, args.gin_bindings):
    gin_files.insert(0, str(saved))
  settings = gin_bindings.load_value(cfg.HybridAccuracy, gin_files, args.gin_bindings,
                                     first=['cfg.HybridAccuracy.run = @cfg.Run()'])
  say = lambda line: print(line, file=sys.stderr, flush=True)
  found = hybrid.evaluate(args.workdir, settings, step=args.step, say=say)
  command = shlex.join(['jaxrl-pt', *args.arguments])
  print(json.dumps({'command': command, **found}, indent=2) if args.json
        else hybrid_report.text(found))
  output = args.output or args.workdir / 'evaluations' / f'hybrid_{found["step"]}.json'
  say(f'Written: {output} and {hybrid_report.write(output, command, found)}')
  return 0


def _eval_game(args: argparse.Namespace) -> int:
  _check_files(args, 'output')
  with _importing():
    from jaxrl_pt import gin_bindings
    from jaxrl_pt.evaluation import game_report, game_worlds
  settings = gin_bindings.load_value(cfg.GameEvaluation, args.gin_file, args.gin_bindings)
  say = lambda line: print(line, file=sys.stderr, flush=True)
  found = game_worlds.evaluate(args.workdir, settings, step=args.step, say=say)
  command = shlex.join(['jaxrl-pt', *args.arguments])
  print(json.dumps({'command': command, **found.results}, indent=2) if args.json
        else game_report.text(found.results))
  name = settings.model if found.results['step'] is None else found.results['step']
  output = args.output or args.workdir / 'evaluations' / f'game_{name}.json'
  say(game_report.summary_line(game_report.write(output, command, found), output))
  return 0


def _score(args: argparse.Namespace) -> int:
  with _importing():
    from jaxrl_pt.jobs import reward_model
  for scored in reward_model.score(args.workdir, args.rows, args.step):
    print(json.dumps(scored, ensure_ascii=False), flush=True)
  return 0


def _judge(args: argparse.Namespace) -> int:
  drawing = _drawing(args)
  _check_files(args, 'output', 'pairs')
  with _importing():
    from jaxrl_pt import gin_bindings
    from jaxrl_pt.environments import judging as asking
    from jaxrl_pt.evaluation import judging
    from jaxrl_pt.run import policy
    from jaxrl_pt.verifiers import tournament
  rows, is_pairs = judging.read(args.rows)
  if is_pairs and args.pairs is not None:
    raise UserError(f'--pairs takes rows of candidates, and {args.rows} holds pairs: leave it out.')
  prompt = None
  if args.gin_file or args.gin_bindings:
    prompt = gin_bindings.load_value(cfg.JudgePrompt, args.gin_file, args.gin_bindings)
  loaded = policy.as_sampled(policy.load_policy(args.workdir, args.step), _held(args))
  speaker = asking.of_policy(loaded, prompt, cfg.Sampler(**drawing), args.num_tokens, args.direct)
  config = asking.engine_config(speaker, judging.prompt_len(speaker, rows, args.prompt_len),
                                args.slots, args.kv)
  judge = asking.make(loaded, speaker, config, args.seed)
  ties: Any = args.ties or ('coin' if args.tournament == 'knockout' else 'half')
  settings = judging.Asking(
      args.votes, args.swap, args.unparsed, args.tournament, args.budget,
      tournament.Rule(ties, is_soft=args.soft, seed=args.seed))
  ended = [] if is_pairs else judging.play(judge, rows, settings)
  found, out = (judging.judge_pairs(judge, rows, settings, args.seed) if is_pairs else
                judging.selected(rows, ended))
  print(json.dumps(found, indent=2) if args.json else judging.text(found, is_pairs))
  if args.output is not None:
    judging.write(args.output, out)
  if args.pairs is not None:
    print(judging.write_pairs(args.pairs, rows, ended), file=sys.stderr)
  return 0


def _answers(args: argparse.Namespace) -> int:
  drawing = _drawing(args)
  if args.pairs is None and args.candidates is None:
    raise UserError('Nothing is written: add --pairs FILE, --candidates FILE or both.')
  _check_files(args, 'pairs', 'candidates')
  with _importing():
    from jaxrl_pt import gin_bindings
    from jaxrl_pt.evaluation import answers
    from jaxrl_pt.run import policy
  given = args.gin_file or args.gin_bindings
  run = gin_bindings.load(args.gin_file, args.gin_bindings)[0] if given else None
  loaded = policy.load_policy(args.workdir, args.step)
  method = (loaded.session.run if run is None else run).objective
  if not isinstance(method, cfg.RL):
    raise UserError(f'Run.objective = @cfg.{type(method).__name__}() has no problems with a '
                    'verifier: give the --gin_file of a run of @cfg.RL(), such as '
                    'gin/run/opo_tiny.gin.')
  answered = answers.draw(
      loaded, method, side='held_out' if args.held_out else 'training', limit=args.limit,
      num_samples=args.num_samples, sampler=cfg.Sampler(**drawing), slots=args.slots,
      seed=args.seed)
  print(answers.summary(answered, args.num_samples))
  if args.candidates is not None:
    print(answers.write_candidates(args.candidates, answered))
  if args.pairs is not None:
    print(answers.write_pairs(args.pairs, answered, args.most_pairs, method.problems.is_chat))
  return 0


def _check_files(args: argparse.Namespace, *names: str) -> None:
  """Refuses folders where files are to be written, before work is done for them."""
  for name in names:
    path = getattr(args, name)
    if path is not None and path.is_dir():
      raise UserError(f'--{name} {path} is a folder: name a file.')


def _eval_tasks(args: argparse.Namespace) -> int:
  if args.gin_file or args.gin_bindings:
    raise UserError('--gin_file and --gin_bindings choose the text of an evaluation without tasks: '
                    'leave them out, or --tasks.')
  tasks = [name for name in args.tasks.split(',') if name]
  if not tasks:
    raise UserError(f'--tasks {args.tasks!r} names none: write for example --tasks wikitext,sums.')
  _check_files(args, 'output')
  # The libraries of Hugging Face read these when they are imported, and then fetch nothing.
  # lm-eval would otherwise fork a process that has JAX's threads, to estimate standard errors.
  os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', HF_EVALUATE_OFFLINE='1',
                    DISABLE_MULTIPROC='1')
  with _importing():
    try:
      from jaxrl_pt.evaluation import benchmark
    except ImportError as e:
      raise UserError(f'`eval --tasks` needs the extra of evaluation ({e}): '
                      "pip install 'jaxrl_pt[eval]'.") from e
  if not args.debug:  # lm-eval's warnings are about its own defaults.
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
  add_bos = {None: None, 'true': True, 'false': False}[args.add_bos_token]
  results = benchmark.evaluate_tasks(
      args.workdir, tasks, step=args.step, include_path=args.include_path, limit=args.limit,
      num_fewshot=args.num_fewshot, max_length=args.max_length, add_bos=add_bos,
      batch_size=args.batch_size, seed=args.seed, is_chat=args.apply_chat_template,
      template=args.template)
  command = shlex.join(['jaxrl-pt', *args.arguments])
  print(benchmark.as_json(command, results) if args.json else benchmark.table(results))
  if args.output is not None:  # After the table, which a full disk does not take away.
    benchmark.write(args.output, command, results)
  return 0


def _import(args: argparse.Namespace) -> int:
  with _importing():
    from jaxrl_pt import exchange
  print(exchange.import_model(args.source, args.workdir, args.adapter))
  return 0


def _export(args: argparse.Namespace) -> int:
  with _importing():
    from jaxrl_pt import exchange
  match args.format:
    case 'hf' | 'hf-packed':
      said = exchange.export_model(args.workdir, args.destination, step=args.step,
                                   packed=args.format == 'hf-packed', verify=args.verify)
    case 'peft':
      if args.verify:
        raise UserError('--verify compares the logits of a whole model, and --format peft writes '
                        'adapters alone: leave --verify out.')
      said = exchange.export_adapter(args.workdir, args.destination, step=args.step)
    case _:
      said = exchange.export_gguf(args.workdir, args.destination, step=args.step,
                                  ternary_type='TQ1_0' if args.format == 'gguf-tq1' else 'TQ2_0',
                                  verify=args.verify)
  print(said)
  return 0


def _methods(args: argparse.Namespace) -> int:
  with _importing():
    from jaxrl_pt import methods
  print(methods.table())
  return 0


def _gin_files(args: argparse.Namespace, folder: str, name: str | None, missing: str) -> list[str]:
  """The files of --gin_file, after the shipped gin/FOLDER/NAME.gin where a name is given.

  Raises:
    UserError: `missing`, where no settings are given at all.
  """
  gin_files = [*([] if name is None else [f'gin/{folder}/{name}.gin']), *args.gin_file]
  if not gin_files and not args.gin_bindings:
    raise UserError(missing)
  return gin_files


def _play(args: argparse.Namespace) -> int:
  if args.workdir is not None or args.game is not None:
    return _play_game(args)
  for name in ('step', 'host', 'port'):
    if getattr(args, name) is not None:
      raise UserError(f'--{name} does nothing without --workdir or --game: add one of them.')
  gin_files = _gin_files(
      args, 'environment', args.environment,
      'No environment given: add --environment guess_number, or --gin_file with the settings of '
      'cfg.Interactive.')
  with _importing():
    from jaxrl_pt import gin_bindings
    from jaxrl_pt.environments import play
    from jaxrl_pt.environments.interactive import Problem
    from jaxrl_pt.serving.lines import read_lines
  settings = gin_bindings.load_value(cfg.Interactive, gin_files, args.gin_bindings)
  is_over = play.play(settings, Problem(args.prompt, args.reference),
                      play.joined(read_lines('> ')), sys.stdout, args.json)
  return 0 if is_over else 1


def _play_game(args: argparse.Namespace) -> int:
  for name in ('environment', 'prompt', 'reference', 'json'):
    if getattr(args, name):
      raise UserError(f'--{name} is for environments of text, and --workdir or --game for models '
                      'of games: leave one of them out.')
  if args.workdir is not None and args.game is not None:
    raise UserError('A model of --workdir has its own game: leave --game out.')
  with _importing():
    from jaxrl_pt import gin_bindings
    from jaxrl_pt.playing import command
  modules = None
  if gin_bindings.binds('MaaG', args.gin_file, args.gin_bindings):
    modules = gin_bindings.load_value(cfg.MaaG, args.gin_file, args.gin_bindings)
  if args.workdir is not None:
    stage, about = command.trained(args.workdir, args.step, modules)
  else:
    source = gin_bindings.load_value(cfg.Trajectories, [f'gin/game/{args.game}.gin'], ())
    stage, about = command.rendered(source.game, 'weak', modules)
  command.serve(stage, about, args.host or '127.0.0.1', 8000 if args.port is None else args.port,
                lambda line: print(line, flush=True))
  return 0


def _trajectories(args: argparse.Namespace) -> int:
  gin_files = _gin_files(
      args, 'game', args.game,
      'No game given: add --game traveler, or --gin_file with the settings of cfg.Trajectories.')
  with _importing():
    from jaxrl_pt import gin_bindings
    from jaxrl_pt.game import film, inspection, records, trajectories
  source = trajectories.Source(gin_bindings.load_value(
      cfg.Trajectories, gin_files, args.gin_bindings))
  inspection.check_asked(source, args.count, args.episode)
  if args.film is not None:
    film.write(args.film, source, args.episode)
  if args.output is not None:
    records.write(source, args.count, args.output)
  found = inspection.inspect(source, args.count)
  print(json.dumps(found, indent=2) if args.json else inspection.text(found))
  return 0


def _spatial(args: argparse.Namespace) -> int:
  with _importing():
    from jaxrl_pt.data.spatial import sheet
  found = sheet.chosen(args.task, args.level, args.split, args.seed, args.index, args.side,
                       args.twin)
  if args.picture is not None:
    sheet.write(args.picture, found)
  if args.json:
    print(json.dumps([sheet.facts(one, args.answer) for one in found], indent=2))
  else:
    print('\n\n'.join(sheet.text(one, args.answer) for one in found))
  return 0


def _replay(args: argparse.Namespace) -> int:
  with _importing():
    from jaxrl_pt.jobs import replay
  half = replay.learner if args.only == 'learner' else replay.sampler
  found: Any = half(args.workdir, args.step)
  print(json.dumps(found, ensure_ascii=False, indent=2) if args.json else replay.text(found))
  return 0


def _doctor(args: argparse.Namespace) -> int:
  with _importing():
    from jaxrl_pt import doctor
  found = doctor.examine(args.workdir)
  print(json.dumps(found, indent=2) if args.json else doctor.text(found))
  return 0 if found['ok'] else 1


def _preflight(args: argparse.Namespace) -> int:
  with _importing():
    from jaxrl_pt.tpu import compile as compiling
    from jaxrl_pt.tpu import search
  say = lambda line: print(line, file=sys.stderr, flush=True)
  say(f'Compiling for {args.topology}; on a laptop this takes some minutes a program.')
  rows = []
  for row in compiling.compile_run(args.topology, args.gin_file, args.gin_bindings,
                                   args.slices):
    rows.append(row)
    if not args.json:
      print(compiling.text(row), flush=True)
  fits = all(row['fits'] for row in rows)
  found = None
  if not fits and not args.no_search and not args.find_slots:
    found = search.fitting(args.topology, args.gin_file, args.gin_bindings, say, args.slices,
                           [row['program'] for row in rows if not row['fits']])
  elif args.find_slots:
    found = search.most_slots(args.topology, args.gin_file, args.gin_bindings, say, args.slices)
  if args.json:
    print(json.dumps({'programs': rows, 'fits': fits, 'fitting_bindings': found}, indent=2))
  elif found:
    print('These settings fit; add\n' + ' \\\n'.join(f'  --gin_bindings "{b}"' for b in found))
  elif found is not None:
    print('No smaller batch, more remat or wider sharding that was tried fits: take a larger '
          'slice.')
  return 0 if fits else 1


def _kernels(args: argparse.Namespace) -> int:
  with _importing():
    from jaxrl_pt.tpu import kernels
  if not args.json:
    print(f'Static predictions for {args.topology} from the compiler\'s schedules; no TPU was '
          'used, and cycles are not times.')
  rows = kernels.report(args.topology, args.kernel, args.only, args.keep)
  failed = 0
  for row in rows:
    failed += bool(row['error'])
    print(json.dumps(row) if args.json else kernels.text(row), flush=True)
  return 1 if failed else 0


_COMMANDS = {'quickstart': _quickstart, 'train': _train, 'sample': _sample, 'chat': _chat,
             'serve': _serve, 'eval': _eval, 'score': _score, 'judge': _judge,
             'answers': _answers, 'import': _import, 'export': _export, 'methods': _methods,
             'play': _play, 'trajectories': _trajectories, 'spatial': _spatial,
             'replay': _replay, 'doctor': _doctor, 'kernels': _kernels, 'preflight': _preflight}


def _hide_closed_loops(unraisable: 'sys.UnraisableHookArgs') -> None:
  """An unraisablehook that drops the errors of TensorStore's threads after a failed save.

  The threads report to an event loop that Orbax has closed by then. The failure itself has been
  raised already, and its one sentence would drown in theirs.
  """
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def _not_of_saves(record: logging.LogRecord) -> bool:
  """A log filter that drops asyncio's traceback of a failed save, which has been raised already."""
  return 'orbax' not in record.getMessage()


def _drop_unwritable_output() -> None:
  """Drops output that a full disk does not take, which would fail again when Python exits."""
  try:
    sys.stdout.flush()
  except OSError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: the arguments after the program's name; None takes the process's own.

  Returns:
    The exit code: 0 for success, 1 if `doctor`, `preflight`, `kernels` or `play` failed, 2 for a
    user's mistake, 75 for a run that a signal stopped after it saved a checkpoint, 130 for an
    interruption, 141 for a closed pipe.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  if '--debug' not in arguments:
    sys.unraisablehook = _hide_closed_loops
    logging.getLogger('asyncio').addFilter(_not_of_saves)
  try:
    args = flags.make_parser().parse_args(arguments)
    args.arguments = arguments
    code = _COMMANDS[args.command](args)
    sys.stdout.flush()  # A closed pipe shows here, not when Python exits.
    return code
  except UserError as e:
    if '--debug' in arguments:
      traceback.print_exc()
    else:
      # Names in damaged files, which a message quotes, may hold line breaks.
      print('jaxrl-pt:', ' '.join(str(e).splitlines()), file=sys.stderr)
    _drop_unwritable_output()
    return 2
  except Preempted as e:
    print(e, flush=True)
    return 75
  except KeyboardInterrupt:
    print(_INTERRUPTED, end='', file=sys.stderr)
    return 130
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


if __name__ == '__main__':
  sys.exit(main())
