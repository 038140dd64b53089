"""Turns the bodies of OpenAI's requests into checked requests of the engine.

Fields mean what they mean to OpenAI. A field that asks for what this server cannot do is refused by
name and never ignored, unless it would not change the answer (`IGNORED`). Beside OpenAI's fields
this server takes `top_k`, `min_p`, `max_thought` and `max_answer`. docs/serving.md lists them all.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
import functools
import hashlib
import itertools
import json
import math
import secrets
from typing import Any, NamedTuple, NoReturn

from jaxrl_pt import config as cfg
from jaxrl_pt.data.tokenizer import Tokenizer, begun
from jaxrl_pt.sampling.engine import Request
from jaxrl_pt.serving.conversation import Message, Template
from jaxrl_pt.serving.text import Markers, encode_marker, spelled

# Fields that clients send by default or for their own records and that do not change the answer.
IGNORED = ('metadata', 'parallel_tool_calls', 'prediction', 'prompt_cache_key',
           'prompt_cache_retention', 'reasoning_effort', 'safety_identifier', 'service_tier',
           'skip_special_tokens', 'store', 'verbosity')
# Fields of a message beside role and content, which this and other servers send with an answer.
IGNORED_IN_MESSAGES = ('name', 'reasoning', 'reasoning_content', 'reasoning_details')
# Fields that other servers support and this one does not, with the values that ask for nothing.
_UNSUPPORTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ('frequency_penalty', (0,)), ('presence_penalty', (0,)), ('repetition_penalty', (1,)),
    ('length_penalty', (1,)), ('logit_bias', ({},)), ('best_of', (1,)),
    ('use_beam_search', (False,)), ('ignore_eos', (False,)), ('min_tokens', (0,)),
    ('stop_token_ids', ([],)), ('typical_p', (1,)), ('guided_json', ()), ('guided_regex', ()),
    ('guided_choice', ()), ('guided_grammar', ()), ('structured_outputs', ()), ('bad_words', ([],)),
    ('prompt_logprobs', (0,)), ('moderation', ()))
_UNSUPPORTED_IN_CHAT: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ('top_logprobs', (0,)), ('tools', ([],)), ('tool_choice', ('none', 'auto')),
    ('functions', ([],)), ('function_call', ('none', 'auto')),
    ('response_format', ({'type': 'text'},)), ('modalities', (['text'],)), ('audio', ()),
    ('web_search_options', ()), ('echo', (False,)), ('chat_template', ()),
    ('chat_template_kwargs', ({},)), ('add_generation_prompt', (True,)),
    ('continue_final_message', (False,)))
_UNSUPPORTED_IN_COMPLETIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ('echo', (False,)), ('suffix', ('',)))
_MOST_STOPS = 4  # Stop texts that a client may send, beside those of the template.
_SEEDED = 2**31  # Ids of requests with a seed start here, all others are smaller.


@dataclass(frozen=True)
class Service:
  """What is served, and the limits of a request.

  name: the model's name for clients.
  max_body_bytes: the largest body of a request.
  max_samples: the largest number of responses to one prompt.
  max_prompts: the largest number of prompts of one body.
  """

  name: str
  tokenizer: Tokenizer
  engine: cfg.Engine
  template: Template = Template()
  markers: Markers = Markers()
  max_body_bytes: int = 1_000_000
  max_samples: int = 16
  max_prompts: int = 16

  @functools.cached_property
  def token_bytes(self) -> list[bytes]:
    """The bytes of each token."""
    return spelled(self.tokenizer, self.markers)


class ApiError(Exception):
  """An error that is answered in the shape of OpenAI's errors."""

  def __init__(self, status: int, message: str, *, param: str | None = None,
               code: str | None = None, headers: dict[str, str] | None = None) -> None:
    super().__init__(message)
    self.status, self.headers = status, headers or {}
    kind = {401: 'authentication_error', 429: 'rate_limit_error'}.get(
        status, 'invalid_request_error' if status < 500 else 'server_error')
    self.body = {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}


class Ask(NamedTuple):
  """What one body asks for."""

  requests: tuple[Request, ...]
  is_chat: bool
  is_stream: bool
  has_usage: bool  # whether the stream ends with the usage
  has_logprobs: bool


class Ids:
  """Gives request ids, which address the noise: always the same for one seed, else fresh ones."""

  def __init__(self) -> None:
    self._fresh = itertools.count(secrets.randbelow(_SEEDED))

  def of(self, seed: int | None) -> int:
    """A request id in [0, 2³²).

    Each seed in [0, 2³¹) has an id of its own. Other seeds are hashed, so that two share an id only
    by chance; 2³¹ + s does not simply share the id of s.
    """
    if seed is None:
      return next(self._fresh) % _SEEDED
    if not 0 <= seed < _SEEDED:
      seed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], 'big')
    return _SEEDED + seed % _SEEDED


# --- Fields ---------------------------------------------------------------------------


def read_json(body: bytes) -> dict[str, Any]:
  """The object that a body holds.

  Raises:
    ApiError: the body is not UTF-8, not JSON or not an object.
  """
  def refuse(constant: str) -> NoReturn:
    raise ValueError(f'{constant} is no number')

  try:
    value = json.loads(body.decode('utf-8'), parse_constant=refuse)
  except UnicodeDecodeError as e:
    raise ApiError(400, f'The body is not UTF-8 text (byte {e.start}).') from e
  except (ValueError, RecursionError) as e:
    what = 'it is nested too deeply' if isinstance(e, RecursionError) else e
    raise ApiError(400, f'The body is not JSON: {what}.') from e
  if not isinstance(value, dict):
    raise ApiError(400, 'The body must be a JSON object.')
  return value


class Fields:
  """A body whose fields are taken one by one; `finish` refuses those that nobody has taken."""

  def __init__(self, body: dict[str, Any]) -> None:
    self._left = {k: v for k, v in body.items() if v is not None}

  def take(self, name: str, expected: str, is_valid: Callable[[Any], bool],
           default: Any = None) -> Any:
    """The field's value, or `default` where it is missing or null.

    Raises:
      ApiError: `is_valid` is false of the value; the message says what is `expected`.
    """
    value = self._left.pop(name, None)
    if value is None:
      return default
    if not is_valid(value):
      raise ApiError(400, f'{name} = {_short(value)}: expected {expected}.', param=name)
    return value

  def integer(self, name: str, default: int | None, low: int, high: int) -> Any:
    return self.take(name, f'a whole number from {low} to {high}',
                     lambda x: _is_integer(x) and low <= x <= high, default)

  def number(self, name: str, default: float, expected: str,
             is_valid: Callable[[float], bool]) -> float:
    return self.take(name, expected, lambda x: (_is_integer(x) or isinstance(x, float)) and
                     abs(x) < 1e30 and math.isfinite(x) and is_valid(x), default)

  def flag(self, name: str) -> bool:
    return self.take(name, 'true or false', lambda x: isinstance(x, bool), False)

  def texts(self, name: str, most: int) -> tuple[str, ...]:
    value = self.take(name, 'a text or a list of texts, none of them empty', lambda x: (
        _is_text(x) if isinstance(x, str) else isinstance(x, list) and all(map(_is_text, x))), ())
    if not isinstance(value, str) and len(value) > most:
      raise ApiError(400, f'{name} holds {len(value)} texts: expected at most {most}.', param=name)
    return (value,) if isinstance(value, str) else tuple(value)

  def refuse(self, name: str, *harmless: Any) -> None:
    """Takes a field that this server does not support; only the `harmless` values pass."""
    value = self._left.pop(name, None)
    if value is not None and value not in harmless:
      raise ApiError(400, f'{name} = {_short(value)}: this server does not support it.',
                     param=name)

  def ignore(self, names: Iterable[str]) -> None:
    """Drops fields that change nothing, whatever their values."""
    for name in names:
      self._left.pop(name, None)

  def finish(self) -> None:
    """Refuses the fields that have not been taken."""
    for name in self._left:
      raise ApiError(400, f'Unknown field {_short(name)}.', param=name)


def _is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
  """Whether it is a text that is not empty and, having no lone surrogates, can be UTF-8."""
  try:
    return isinstance(value, str) and bool(value.encode())
  except UnicodeEncodeError:
    return False


def _short(value: Any) -> str:
  text = ascii(value)
  return text if len(text) <= 60 else text[:57] + '...'


# --- Bodies ---------------------------------------------------------------------------


def completion(body: dict[str, Any], service: Service, ids: Ids) -> Ask:
  """What a body of /v1/completions asks for.

  Raises:
    ApiError: 400 for a body that cannot be answered, 404 for another model.
  """
  fields = Fields(body)
  _check_model(fields, service)
  prompts = fields.take(
      'prompt', f'a text, a list of token ids, or a list of at most {service.max_prompts} of '
      'either, none of them empty', lambda x: _is_prompts(x, service.max_prompts))
  if prompts is None:
    raise ApiError(400, 'prompt is missing.', param='prompt')
  if isinstance(prompts, str) or _is_integer(prompts[0]):
    prompts = [prompts]
  # Token ids are taken as they are: a client that sends them decides how they begin.
  tokens = [begun(service.tokenizer, service.tokenizer.encode(p)) if isinstance(p, str) else p
            for p in prompts]
  has_logprobs = fields.take(
      'logprobs', '0: the drawn token\'s own log-probability is all that can be given',
      lambda x: _is_integer(x) and x == 0) is not None
  for name, harmless in _UNSUPPORTED_IN_COMPLETIONS:
    fields.refuse(name, *harmless)
  max_tokens = fields.integer('max_tokens', min(16, service.engine.response_len), 1,
                              service.engine.response_len)
  return _ask(fields, service, ids, tokens, max_tokens, is_chat=False, has_logprobs=has_logprobs)


def chat(body: dict[str, Any], service: Service, ids: Ids) -> Ask:
  """What a body of /v1/chat/completions asks for.

  Raises:
    ApiError: 400 for a body that cannot be answered, 404 for another model.
  """
  fields = Fields(body)
  _check_model(fields, service)
  messages = fields.take('messages', 'a list of at least one message',
                         lambda x: isinstance(x, list) and bool(x))
  if messages is None:
    raise ApiError(400, 'messages is missing.', param='messages')
  prompt = service.template.prompt(
      service.tokenizer, [_message(m, f'messages[{i}]') for i, m in enumerate(messages)])
  has_logprobs = fields.flag('logprobs')
  for name, harmless in _UNSUPPORTED_IN_CHAT:
    fields.refuse(name, *harmless)
  most = service.engine.response_len
  max_tokens = fields.integer('max_tokens', most, 1, most)
  max_tokens = fields.integer('max_completion_tokens', max_tokens, 1, most)
  return _ask(fields, service, ids, [prompt], max_tokens, is_chat=True, has_logprobs=has_logprobs)


def _ask(fields: Fields, service: Service, ids: Ids, prompts: Sequence[Sequence[int]],
         max_tokens: int, *, is_chat: bool, has_logprobs: bool) -> Ask:
  """Reads the fields that both kinds of bodies have."""
  is_stream = fields.flag('stream')
  options = Fields(fields.take('stream_options', 'an object', lambda x: isinstance(x, dict), {}))
  has_usage = options.flag('include_usage')
  options.ignore(('include_obfuscation',))
  options.finish()
  for name, harmless in _UNSUPPORTED:
    fields.refuse(name, *harmless)
  fields.ignore(IGNORED)
  fields.take('user', 'a text', lambda x: isinstance(x, str))  # Checked, then dropped.
  seed = fields.integer('seed', None, -2**63, 2**63 - 1)
  num_samples = fields.integer('n', 1, 1, service.max_samples)
  sampler = cfg.Sampler(
      temperature=fields.number('temperature', 1.0, 'a number of at least 0', lambda x: x >= 0),
      top_k=fields.integer('top_k', 0, 0, 2**31 - 1),
      top_p=fields.number('top_p', 1.0, 'a number above 0 and at most 1', lambda x: 0 < x <= 1),
      min_p=fields.number('min_p', 0.0, 'a number from 0 to 1', lambda x: 0 <= x <= 1))
  stop_ids, own_stops = service.template.stops(service.tokenizer) if is_chat else ((), ())
  stop = (*own_stops, *fields.texts('stop', _MOST_STOPS))
  most = service.engine.response_len
  max_thought = fields.integer('max_thought', None, 0, most)
  max_answer = fields.integer('max_answer', None, 1, most)
  fields.finish()
  # A budget for thinking makes the response begin with the start marker of thinking.
  forced = () if max_thought is None else encode_marker(service.tokenizer, service.markers.start)
  return Ask(tuple(
      Request(tuple(tokens), ids.of(seed), min(max_tokens + len(forced), most), num_samples,
              sampler, (service.tokenizer.eos_id, *stop_ids), stop, forced, max_thought, max_answer)
      for tokens in prompts), is_chat, is_stream, has_usage, has_logprobs)


def _check_model(fields: Fields, service: Service) -> None:
  name = fields.take('model', 'a text', lambda x: isinstance(x, str), service.name)
  if name != service.name:
    raise ApiError(404, f'There is no model {_short(name)} here, only {service.name!r}.',
                   param='model', code='model_not_found')


def _is_prompts(value: Any, most: int) -> bool:
  is_one = lambda x: _is_text(x) or (isinstance(x, list) and bool(x) and all(map(_is_integer, x)))
  return is_one(value) or (
      isinstance(value, list) and 1 <= len(value) <= most and all(map(is_one, value)))


def _message(value: Any, where: str) -> Message:
  fields = Fields(value if isinstance(value, dict) else {})
  role = fields.take('role', 'system, developer, user or assistant',
                     lambda x: x in ('system', 'developer', 'user', 'assistant'))
  content = fields.take('content', 'a text or a list of text parts', _is_content)
  if content is None and role == 'assistant' and 'content' in value:
    content = ''  # The answer held only a thought, or an empty list of calls.
  if role is None or content is None:
    raise ApiError(400, f'{where} must be an object with a role and a content.', param='messages')
  # Servers put these fields into their answers; empty ones may come back in a conversation.
  for name, harmless in (('tool_calls', []), ('annotations', []), ('function_call', {}),
                         ('refusal', ''), ('audio', {})):
    fields.refuse(name, harmless)
  fields.ignore(IGNORED_IN_MESSAGES)
  fields.finish()
  if isinstance(content, list):
    content = ''.join(part['text'] for part in content)
  return Message('system' if role == 'developer' else role, content)


def _is_content(value: Any) -> bool:
  if isinstance(value, list):
    return all(isinstance(part, dict) and part.get('type') == 'text' and
               _is_text(part.get('text')) for part in value)
  return value == '' or _is_text(value)
