"""Turns the bodies of OpenAI's requests into checked requests of the engine.

Fields mean what they mean to OpenAI. A field that asks for what this server cannot do is refused by
name and never ignored, unless it would not change the answer (`IGNORED`). Beside OpenAI's fields
this server takes `top_k`, `min_p`, `max_thought`, `max_answer`, `guided_regex`, `guided_json` and
what `thinking.take` takes. docs/serving.md lists them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import functools
import hashlib
import itertools
import json
import secrets
from typing import Any, NamedTuple

from jaxrl_pt import config as cfg
from jaxrl_pt.data import chat_files
from jaxrl_pt.data.chat import ChatTemplate, prompt_ids
from jaxrl_pt.data.tokenizer import Tokenizer, begun
from jaxrl_pt.errors import UserError
from jaxrl_pt.sampling.engine import Request
from jaxrl_pt.serving import formats, thinking, tools
from jaxrl_pt.serving.comparing import Speaker
from jaxrl_pt.serving.constraint import Constraint, Guide
from jaxrl_pt.serving.fields import ApiError, Fields, is_integer, is_object, is_text, short
from jaxrl_pt.serving.text import CALLS, Markers, spelled
from jaxrl_pt.serving.thinking import Steering, Thinker, Wish
from jaxrl_pt.serving.tools import Tools

# Fields that clients send by default or for their own records and that do not change the answer.
IGNORED = ('metadata', 'prediction', 'prompt_cache_key', 'prompt_cache_retention',
           'safety_identifier', 'service_tier', 'skip_special_tokens', 'store',
           'verbosity')
# Fields of a message beside role and content, which this and other servers send with an answer.
IGNORED_IN_MESSAGES = ('name', 'reasoning', 'reasoning_content', 'reasoning_details')
# Fields that other servers support and this one does not, with the values that ask for nothing.
_UNSUPPORTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ('frequency_penalty', (0,)), ('presence_penalty', (0,)), ('repetition_penalty', (1,)),
    ('length_penalty', (1,)), ('logit_bias', ({},)), ('use_beam_search', (False,)),
    ('ignore_eos', (False,)), ('min_tokens', (0,)), ('stop_token_ids', ([],)), ('typical_p', (1,)),
    ('guided_choice', ()), ('guided_grammar', ()), ('structured_outputs', ()), ('bad_words', ([],)),
    ('prompt_logprobs', (0,)), ('moderation', ()))
_UNSUPPORTED_IN_CHAT: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ('functions', ([],)), ('function_call', ('none', 'auto')), ('modalities', (['text'],)),
    ('audio', ()), ('web_search_options', ()), ('echo', (False,)), ('chat_template', ()),
    ('add_generation_prompt', (True,)), ('continue_final_message', (False,)))
_UNSUPPORTED_IN_COMPLETIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (('suffix', ('',)),)
_MOST_STOPS = 4  # Stop texts that a client may send, beside those of the template.
_MOST_LOGPROBS = 20
_SEEDED = 2**31  # Ids of requests with a seed start here, all others are smaller.


@dataclass(frozen=True)
class Service:
  """What is served, and the limits of a request.

  name: the model's name for clients.
  vocab_size: V of the model, which may be more than the tokenizer's.
  template: of conversations; None takes the plain one.
  sampler: how responses are drawn where a request does not say it.
  max_body_bytes: the largest body of a request.
  max_samples: the largest number of responses to one prompt.
  max_prompts: the largest number of prompts of one body.
  judge: how the model is asked to compare documents; None where its tokenizer cannot write the
    verdicts.
  """

  name: str
  tokenizer: Tokenizer
  engine: cfg.Engine
  vocab_size: int
  template: ChatTemplate | None = None
  markers: Markers = Markers()
  sampler: cfg.Sampler = cfg.Sampler()
  max_body_bytes: int = 1_000_000
  max_samples: int = 16
  max_prompts: int = 16
  judge: Speaker | None = None

  @functools.cached_property
  def token_bytes(self) -> list[bytes]:
    """The bytes of each token."""
    return spelled(self.tokenizer, self.markers)

  @functools.cached_property
  def layout(self) -> ChatTemplate:
    """The template of conversations."""
    return self.template or chat_files.plain(self.tokenizer)

  @functools.cached_property
  def end_tokens(self) -> tuple[int, ...]:
    """The tokens that end an answer of a conversation."""
    return chat_files.end_tokens(self.layout, self.tokenizer)

  @functools.cached_property
  def thinker(self) -> Thinker:
    """How the policy is made to think in a conversation, or not to."""
    return Thinker(self.tokenizer, self.markers, self.layout)

  @functools.cached_property
  def plain_thinker(self) -> Thinker:
    """How it is where a prompt is no conversation."""
    return Thinker(self.tokenizer, self.markers)

  @functools.cached_property
  def guide(self) -> Guide:
    """What makes constraints for the model's vocabulary."""
    return Guide(self.tokenizer, self.vocab_size)


class Ask(NamedTuple):
  """What one body asks for."""

  requests: tuple[Request, ...]
  num_choices: int  # responses to each prompt that the answer holds
  is_chat: bool
  is_stream: bool
  has_usage: bool  # whether the stream ends with the usage
  has_logprobs: bool
  echoes: tuple[str, ...] = ()  # the prompts' texts, where each choice begins with its prompt
  tools: Tools = Tools()
  constraint: Constraint | None = None  # that of every request
  opens_thought: bool = False  # whether the prompt ends inside a thought


class _Shape(NamedTuple):
  """What a body says in the fields that only completions, or only chats, have."""

  prompts: Sequence[Sequence[int]]
  max_tokens: int
  is_chat: bool
  has_logprobs: bool
  num_top: int  # most probable tokens whose log-probabilities are given
  echoes: tuple[str, ...] = ()
  tools: Tools = Tools()
  wish: Wish = Wish()
  wished_by: str = ''  # the field that says the wish


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


# --- Bodies ---------------------------------------------------------------------------


def completion(body: dict[str, Any], service: Service, ids: Ids) -> Ask:
  """What a body of /v1/completions asks for.

  Raises:
    ApiError: 400 for a body that cannot be answered, 404 for another model.
  """
  fields = Fields(body)
  check_model(fields, service)
  prompts = fields.need(
      'prompt', f'a text, a list of token ids, or a list of at most {service.max_prompts} of '
      'either, none of them empty', lambda x: _is_prompts(x, service.max_prompts))
  if isinstance(prompts, str) or is_integer(prompts[0]):
    prompts = [prompts]
  # Token ids are taken as they are: a client that sends them decides how they begin.
  tokens = [begun(service.tokenizer, service.tokenizer.encode(p)) if isinstance(p, str) else p
            for p in prompts]
  num_top = fields.integer('logprobs', None, 0, _MOST_LOGPROBS)
  has_echo = fields.flag('echo')
  for name, harmless in _UNSUPPORTED_IN_COMPLETIONS:
    fields.refuse(name, *harmless)
  fields.ignore(('parallel_tool_calls',))  # There are no tools.
  most = service.engine.response_len
  # Where nothing is drawn, only the prompt is scored.
  max_tokens = fields.integer('max_tokens', min(16, most), 0 if has_echo else 1, most)
  echoes = [p if isinstance(p, str) else service.tokenizer.decode(p) for p in prompts]
  wish, wished_by = thinking.take(fields, max_tokens, most)
  return _ask(fields, service, ids, _Shape(
      tokens, max_tokens, False, num_top is not None, num_top or 0,
      tuple(echoes) if has_echo else (), wish=wish, wished_by=wished_by))


def chat(body: dict[str, Any], service: Service, ids: Ids) -> Ask:
  """What a body of /v1/chat/completions asks for.

  Raises:
    ApiError: 400 for a body that cannot be answered, 404 for another model.
  """
  fields = Fields(body)
  check_model(fields, service)
  messages = fields.need('messages', 'a list of at least one message',
                         lambda x: isinstance(x, list) and bool(x))
  offered = tools.take(fields)
  said = [_message(m, f'messages[{i}]') for i, m in enumerate(messages)]
  most = service.engine.response_len
  max_tokens = fields.integer('max_tokens', most, 1, most)
  max_tokens = fields.integer('max_completion_tokens', max_tokens, 1, most)
  wish, wished_by = thinking.take(fields, max_tokens, most)
  try:
    prompt = prompt_ids(service.thinker.told(wish), service.tokenizer, said,
                        [json.loads(tool.text) for tool in offered.tools])
  except UserError as e:
    raise ApiError(400, str(e), param='messages') from e
  has_logprobs = fields.flag('logprobs')
  num_top = fields.integer('top_logprobs', 0, 0, _MOST_LOGPROBS)
  if num_top and not has_logprobs:
    raise ApiError(400, f'top_logprobs = {num_top}: expected logprobs = true beside it.',
                   param='top_logprobs')
  for name, harmless in _UNSUPPORTED_IN_CHAT:
    fields.refuse(name, *harmless)
  return _ask(fields, service, ids, _Shape([prompt], max_tokens, True, has_logprobs, num_top,
                                           tools=offered, wish=wish, wished_by=wished_by))


def _ask(fields: Fields, service: Service, ids: Ids, shape: _Shape) -> Ask:
  """Reads the fields that both kinds of bodies have."""
  is_stream = fields.flag('stream')
  options = Fields(fields.take('stream_options', 'an object', is_object, {}), 'stream_options')
  has_usage = options.flag('include_usage')
  options.ignore(('include_obfuscation',))
  options.finish()
  for name, harmless in _UNSUPPORTED:
    fields.refuse(name, *harmless)
  fields.ignore(IGNORED)
  fields.take('user', 'a text', lambda x: isinstance(x, str))  # Checked, then dropped.
  seed = fields.integer('seed', None, -2**63, 2**63 - 1)
  num_choices, num_samples = _numbers(fields, service, is_stream)
  sampler = _sampler(fields, service.sampler)
  ends = service.end_tokens if shape.is_chat else service.tokenizer.stop_ids
  own_stops = service.layout.stop_texts if shape.is_chat else ()
  stop = (*own_stops, *fields.texts('stop', _MOST_STOPS))
  most = service.engine.response_len
  thinker = service.thinker if shape.is_chat else service.plain_thinker
  steering = _steering(fields, thinker, shape, most)
  max_answer = fields.integer('max_answer', None, 1, most)
  # The format holds after a thought, or after what is forced in its place.
  held_to = _constraint(fields, service, shape.tools, ends,
                        thinker.end if steering.begins_thinking else steering.forced)
  fields.finish()
  max_tokens = min(shape.max_tokens + len(steering.forced), most) if shape.max_tokens else 0
  scores_prompt = bool(shape.echoes) and (shape.has_logprobs or not max_tokens)
  return Ask(tuple(
      Request(tuple(tokens), ids.of(seed), max_tokens, num_samples, sampler, ends, stop,
              steering.forced, steering.max_thought, max_answer, shape.num_top, scores_prompt,
              held_to, begins_thinking=steering.begins_thinking)
      for tokens in shape.prompts), num_choices, shape.is_chat, is_stream, has_usage,
      shape.has_logprobs, shape.echoes, shape.tools, held_to, thinker.is_open(shape.prompts[0]))


def _steering(fields: Fields, thinker: Thinker, shape: _Shape, most: int) -> Steering:
  """How the responses are made to think; `max_thought` makes those of any policy do so."""
  max_thought, prompt = fields.integer('max_thought', None, 0, most), shape.prompts[0]
  if max_thought is None:
    try:
      return thinker.steer(shape.wish, prompt)
    except UserError as e:
      raise ApiError(400, str(e), param=shape.wished_by) from e
  if shape.wish != Wish():
    raise ApiError(400, f'max_thought cannot be combined with {shape.wished_by}: expected one of '
                   'them.', param='max_thought')
  return thinker.think(max_thought, prompt)


def _sampler(fields: Fields, own: cfg.Sampler) -> cfg.Sampler:
  """How responses are drawn: as the model's `own` sampler where the body does not say it."""
  try:
    return cfg.Sampler(
        temperature=fields.number('temperature', own.temperature, 'a number of at least 0',
                                  lambda x: x >= 0),
        top_k=fields.integer('top_k', own.top_k, 0, 2**31 - 1),
        top_p=fields.number('top_p', own.top_p, 'a number above 0 and at most 1',
                            lambda x: 0 < x <= 1),
        min_p=fields.number('min_p', own.min_p, 'a number from 0 to 1', lambda x: 0 <= x <= 1))
  except UserError as e:  # A temperature so near 0, or so large, that logits lose their meaning.
    raise ApiError(400, str(e).removeprefix('Sampler.'), param='temperature') from e


def _numbers(fields: Fields, service: Service, is_stream: bool) -> tuple[int, int]:
  """How many responses to each prompt are answered, and how many are drawn to choose from."""
  num_choices = fields.integer('n', 1, 1, service.max_samples)
  num_samples = fields.integer('best_of', num_choices, 1, service.max_samples)
  if num_samples < num_choices:
    raise ApiError(400, f'best_of = {num_samples}: expected at least n = {num_choices}.',
                   param='best_of')
  if is_stream and num_samples > num_choices:
    raise ApiError(400, f'best_of = {num_samples}: expected n = {num_choices} with a stream, since '
                   'the best are known only at the end.', param='best_of')
  return num_choices, num_samples


def _constraint(fields: Fields, service: Service, offered: Tools, ends: tuple[int, ...],
                after: tuple[int, ...]) -> Constraint | None:
  """What a format, or the use of tools, holds the responses to; None where they are free.

  It holds after the tokens `after`, where there are any.
  """
  wanted = formats.take(fields)
  if wanted and offered.tools:
    raise ApiError(400, f'{wanted.field} cannot be combined with tools: expected one of them, or '
                   'tool_choice = "none".', param=wanted.field)
  if offered.needs_grammar:
    wanted = formats.Format('tools', tools.grammar(
        offered, is_special=CALLS.start in service.tokenizer.special_tokens))
  if wanted is None:
    return None
  try:
    return service.guide.constraint(wanted.grammar, ends, after)
  except ValueError as e:
    raise ApiError(400, f'{wanted.field} cannot be met: {e}.', param=wanted.field) from e


def check_model(fields: Fields, service: Service) -> None:
  """Takes the field `model`.

  Raises:
    ApiError: 404 for another model than the one that is served.
  """
  name = fields.take('model', 'a text', lambda x: isinstance(x, str), service.name)
  if name != service.name:
    raise ApiError(404, f'There is no model {short(name)} here, only {service.name!r}.',
                   param='model', code='model_not_found')


def _is_prompts(value: Any, most: int) -> bool:
  is_one = lambda x: is_text(x) or (isinstance(x, list) and bool(x) and all(map(is_integer, x)))
  return is_one(value) or (
      isinstance(value, list) and 1 <= len(value) <= most and all(map(is_one, value)))


# --- Messages -------------------------------------------------------------------------


def _message(value: Any, where: str) -> dict[str, Any]:
  """A message as templates read it."""
  if not isinstance(value, dict):
    raise ApiError(400, f'{where} must be an object with a role and a content.', param='messages')
  fields = Fields(value, where)
  role = fields.take('role', 'system, developer, user, assistant or tool', lambda x: x in (
      'system', 'developer', 'user', 'assistant', 'tool'))
  content = fields.take('content', 'a text or a list of text parts', _is_content)
  message: dict[str, Any] = {}
  if role == 'assistant':
    said = fields.take('tool_calls', 'a list of calls', lambda x: isinstance(x, list), [])
    if calls := tools.take_calls(said, f'{where}.tool_calls'):
      message['tool_calls'] = calls
    if content is None and 'content' in value or calls:
      content = content or ''  # The answer held only a thought, or only calls.
    thought = fields.take('reasoning_content', 'a text', lambda x: x == '' or is_text(x))
    if thought is not None:
      message['reasoning_content'] = thought
  elif role == 'tool':
    # In most templates the order of the messages says which call it answers.
    message['tool_call_id'] = fields.take('tool_call_id', 'a text', is_text)
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
  return message | {'role': 'system' if role == 'developer' else role, 'content': content}


def _is_content(value: Any) -> bool:
  if isinstance(value, list):
    return all(isinstance(part, dict) and part.get('type') == 'text' and
               is_text(part.get('text')) for part in value)
  return value == '' or is_text(value)
