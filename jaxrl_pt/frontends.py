"""The commands that use a trained model: `sample`, `chat` and `serve`."""

from collections.abc import Sequence
import functools
import io
import json
import os
from pathlib import Path
import signal
import socket
import sys
from typing import Any, NamedTuple, TextIO

from rich.console import Console

from jaxrl_pt import config as cfg
from jaxrl_pt.data import chat_files, template_text
from jaxrl_pt.data.chat import ChatTemplate
from jaxrl_pt.environments import judging
from jaxrl_pt.errors import UserError
from jaxrl_pt.run import interrupt, places, samples
from jaxrl_pt.run.policy import Held, Policy, as_sampled, load_policy
from jaxrl_pt.sampling.engine import Engine
from jaxrl_pt.serving import terminal
from jaxrl_pt.serving.addresses import is_loopback
from jaxrl_pt.serving.comparing import Speaker
from jaxrl_pt.serving.lines import read_lines
from jaxrl_pt.serving.text import Markers
from jaxrl_pt.serving.thinking import Thinker, Thinking, Wish
from jaxrl_pt.serving.worker import Worker

TOKEN_VARIABLE = 'JAXRL_PT_TOKEN'
_SHUTDOWN_SECONDS = 30  # time for the answers under way to end


class Thought(NamedTuple):
  """What the flags say of thinking; `thinking.Wish` says what the first two mean.

  markers: the texts that start and end a thought; None takes those of the run's modes, else the
    usual ones.
  no_think: the text of the mode that answers at once; None takes that of the run's modes, if it has
    any, and '' says that there is none.
  """

  thinking: Thinking = 'auto'
  budget: int | None = None
  markers: Sequence[str] | None = None
  no_think: str | None = None


# --- sample ---------------------------------------------------------------------------


def read_prompts(path: Path) -> list[str]:
  """The prompts in a file: its lines, or the "prompt" of each line if it is a .jsonl file.

  Raises:
    UserError: the file cannot be read, is not UTF-8, has a line without a prompt, or has no prompt.
  """
  try:
    lines = path.read_bytes().decode('utf-8-sig').splitlines()
  except OSError as e:
    raise UserError(f'Cannot read the prompts in {path}: {e.strerror}.') from e
  except UnicodeDecodeError as e:
    raise UserError(f'{path} is not UTF-8 text (byte {e.start}): convert it first.') from e
  prompts = [_json_prompt(line, f'{path}:{n}') if path.suffix == '.jsonl' else line
             for n, line in enumerate(lines, 1) if line.strip()]
  if not prompts:
    raise UserError(f'{path} holds no prompt: write one a line.')
  return prompts


def _json_prompt(line: str, where: str) -> str:
  try:
    prompt = json.loads(line)['prompt']
    prompt.encode()
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
    raise UserError(f'{where}: expected an object like {{"prompt": "some text"}}.') from e
  return prompt


def sample(workdir: Path, prompts: list[str] | None, *, step: int | None, as_json: bool,
           prompt_len: int, seed: int, reading: samples.Reading, held: Held,
           stop: tuple[str, ...], drawing: dict[str, Any], thought: Thought, **settings: Any
           ) -> None:
  """Prints continuations as they are drawn, or all of them as JSON.

  Args:
    workdir: the work directory of a trained model.
    prompts: the prompts; None asks for them on the terminal, one after the other.
    step: the checkpoint's step; None takes the newest good one.
    as_json: whether to print one JSON list at the end.
    prompt_len: most tokens of a prompt that is typed at the terminal.
    seed: the seed of the noise; equal seeds draw equal samples.
    reading: how the cache is kept and read.
    held: how the weights are held.
    stop: texts that end a sample.
    drawing: the fields of `cfg.Sampler` that were given; the others are the model's own.
    thought: whether samples think first.
    settings: num_tokens and num_samples of `samples.stream_samples`.
  """
  wish = Wish(thought.thinking, thought.budget)
  settings['sampler'] = _sampler(workdir, drawing, sys.stderr)
  policy = as_sampled(load_policy(workdir, step), held)
  thinker = None
  if wish != Wish():
    thinker = Thinker(policy.session.data.tokenizer, _markers(thought, policy))
    settings['steering'] = thinker.steer(wish, ())
  engine = samples.engine_for(
      policy, prompts or [], seed=seed, reading=reading, prompt_len=1 if prompts else prompt_len,
      num_tokens=settings['num_tokens'], num_samples=settings['num_samples'], thinker=thinker)

  def show(some: list[str]) -> None:
    _show_samples(policy, engine, as_json, some, stop=stop, **settings)

  if prompts is not None:
    show(prompts)
    return
  for line in read_lines('prompt> '):
    try:
      line.encode()
      show([line])
    except UnicodeEncodeError:
      print('jaxrl-pt: That line is not UTF-8 text.', file=sys.stderr)
    except UserError as e:  # The next prompt may be better.
      print(f'jaxrl-pt: {e}', file=sys.stderr)


def _show_samples(policy: Policy, engine: Engine, as_json: bool,
                  prompts: list[str], **settings: Any) -> None:
  pieces = samples.stream_samples(engine, policy, prompts, **settings)
  if as_json:
    print(json.dumps(samples.collect(prompts, pieces), ensure_ascii=False, indent=2))
    return
  terminal.show_samples(pieces, prompts, settings['num_samples'], sys.stdout)
  counters = engine.counters()
  if drafted := counters['drafted']:
    print(f'=== of {drafted} drafted tokens {counters["agreed"]} were kept '
          f'({counters["agreed"] / drafted:.0%}), in {counters["steps"]} steps')


# --- chat -----------------------------------------------------------------------------


def chat(workdir: Path, *, step: int | None, prompt_len: int, template: Path | None,
         thought: Thought, seed: int, kv: cfg.KV, held: Held,
         drawing: dict[str, Any], **settings: Any) -> None:
  """Holds a conversation at the terminal.

  Args:
    workdir: the work directory of a trained model.
    step: the checkpoint's step; None takes the newest good one.
    prompt_len: most tokens of a conversation that the model sees.
    template: a file of Jinja2; None takes the model's own, or plain text where it has none.
    thought: whether answers think first, and what encloses a thought.
    seed: the seed of the noise; equal seeds and equal lines get equal answers.
    kv: how keys and values are stored.
    held: how the weights are held.
    drawing: the fields of `cfg.Sampler` that were given; the others are the model's own.
    settings: the other keyword arguments of `terminal.Chat`.
  """
  given = chat_files.read_template(template) if template else None
  wish = Wish(thought.thinking, thought.budget)
  if wish != Wish() and settings['max_thought'] is not None:
    raise UserError('--max_thought makes any model think, which --thinking and --thinking_budget '
                    'say otherwise: leave it out, or both of them.')
  console = Console(highlight=False)
  sampler = _sampler(workdir, drawing, sys.stderr)
  policy = as_sampled(load_policy(workdir, step), held)
  tokenizer = policy.session.data.tokenizer
  talk = terminal.Chat(tokenizer, _template(given, policy), _markers(thought, policy), sampler,
                       wish=wish, **settings)
  longest = talk.request((0,), 0).max_tokens
  engine = samples.make_engine(
      policy, cfg.Engine(slots=1, queue=1, prompt_len=prompt_len, response_len=longest,
                         kv=kv, steps_per_call=2),
      seed=seed, thinker=talk.thinker)
  engine.check(talk.request((0,), 0))
  if console.is_terminal:
    console.print(f'{_name(workdir)}, step {policy.step}. Ctrl-C stops an answer, /new starts a '
                  'new conversation, Ctrl-D leaves.', style='dim', markup=False)
  terminal.talk(engine, talk, read_lines('you> '), console)


def _template(given: ChatTemplate | None, policy: Policy) -> ChatTemplate:
  """The template that was given, else the model's own, else the plain one."""
  session = policy.session
  return chat_files.of_model(session.workdir / places.CARRIED, session.data.tokenizer, given)


def _markers(thought: Thought, policy: Policy) -> Markers:
  """The markers that were given, else those of the modes of the policy's run, else the usual ones.

  Raises:
    UserError: a mode is not one token.
  """
  modes, own = cfg.modes_of(policy.session.run), Markers()
  if isinstance(modes, cfg.HybridModes):
    own = Markers(modes.think, modes.think_end, modes.no_think)
  start, end = thought.markers or own[:2]
  found = Markers(start, end, own.no_think if thought.no_think is None else thought.no_think)
  if found.no_think:
    for name, text in (('The first of --markers', start), ('--no_think', found.no_think)):
      template_text.one_token(policy.session.data.tokenizer, name, text)
  return found


def _sampler(workdir: Path, given: dict[str, Any], out: TextIO) -> cfg.Sampler:
  """How responses are drawn: as the flags say, else as the model's authors do.

  Raises:
    UserError: the model's generation_config.json holds a value that cannot be.
  """
  own = chat_files.sampling(workdir / places.CARRIED)
  if taken := [f'{name} {value:g}' for name, value in own.items() if name not in given]:
    print(f'note: drawn as generation_config.json of the model says: {", ".join(taken)}.', file=out)
  return cfg.Sampler(**own | given)


def _name(workdir: Path) -> str:
  return workdir.resolve().name


# --- serve ----------------------------------------------------------------------------


def serve(workdir: Path, *, step: int | None, host: str, port: int, token_file: Path | None,
          engine: cfg.Engine, max_samples: int, template: Path | None, thought: Thought,
          seed: int, held: Held, access_log: bool) -> None:
  """Serves a model over HTTP until SIGTERM or Ctrl-C, and then ends the answers under way.

  Args:
    workdir: the work directory of a trained model; its last component is the model's name.
    step: the checkpoint's step; None takes the newest good one.
    host, port: the address to listen at; port 0 takes a free one.
    token_file: a file with the token that clients must send; None takes the environment variable
      `TOKEN_VARIABLE`, if it is set.
    engine: the engine's sizes.
    max_samples: most responses to one prompt.
    template: a file of Jinja2; None takes the model's own, or plain text where it has none.
    thought: what encloses a thought; requests say whether they want one.
    seed: the seed of the noise, together with each request's own seed.
    held: how the weights are held.
    access_log: whether to write one line a request to standard error.

  Raises:
    UserError: the address cannot be listened at, or is open to others without a token.
  """
  try:
    import uvicorn

    from jaxrl_pt.serving import app, connections
    from jaxrl_pt.serving.protocol import Service
  except ImportError as e:
    raise UserError('`serve` needs the extra of that name: '
                    "pip install 'jaxrl_pt[serve]'.") from e
  token = _read_token(token_file)
  given = chat_files.read_template(template) if template else None
  if token is None and not is_loopback(host):
    raise UserError(f'--host {host} lets others in: give a --token_file, or set '
                    f'{TOKEN_VARIABLE}, that clients must send.')
  listening = _listen(host, port)
  with listening, interrupt.stop_on_signals(
      (signal.SIGTERM, signal.SIGINT)) as stopped:
    policy = as_sampled(load_policy(workdir, step), held)
    tokenizer = policy.session.data.tokenizer
    service = Service(_name(workdir), tokenizer, engine, policy.model.config.vocab_size,
                      _template(given, policy), _markers(thought, policy),
                      _sampler(workdir, {}, sys.stderr), max_samples=max_samples,
                      judge=_judge(policy, engine))
    worker = Worker(samples.make_engine(policy, engine, seed=seed, thinker=service.thinker))
    log = functools.partial(print, file=sys.stderr, flush=True) if access_log else None
    server = uvicorn.Server(connections.server_config(
        app.make_app(service, worker, token, log), shutdown_seconds=_SHUTDOWN_SECONDS))
    if stopped.number:
      return
    shown = f'[{host}]' if ':' in host else host
    print(f'Serving {service.name}, step {policy.step}, at '
          f'http://{shown}:{listening.getsockname()[1]}/v1', flush=True)
    server.run(sockets=[listening])


def _judge(policy: Policy, engine: cfg.Engine) -> Speaker | None:
  """How the policy is asked to compare documents; None if it cannot write the verdicts."""
  sampler = _sampler(policy.session.workdir, {}, io.StringIO())
  try:
    return judging.of_policy(policy, None, sampler, engine.response_len, is_direct=False)
  except UserError:
    return None


def _read_token(path: Path | None) -> str | None:
  """The token that clients must send; None if neither file nor environment has one."""
  if path is None:
    token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    if token is None:
      return None
  else:
    where = str(path)
    try:
      token = path.read_text(encoding='ascii').strip()
    except (OSError, UnicodeDecodeError) as e:
      raise UserError(f'Cannot read a token in {path} ({e}).') from e
  if not token or not all('!' <= c <= '~' for c in token):
    raise UserError(f'{where} must hold one token of visible ASCII characters, without spaces.')
  return token


def _listen(host: str, port: int) -> socket.socket:
  try:
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    return socket.create_server((host.strip('[]'), port), family=family)
  except (OSError, OverflowError) as e:
    raise UserError(f'Cannot listen at {host}:{port} ({e}): choose another --host or '
                    '--port.') from e
