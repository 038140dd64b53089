"""What a model's folder says of conversations and of drawing, and a plain template for others.

A Hugging Face folder keeps its chat template in tokenizer_config.json (one, or a list of named
ones) or in chat_template.jinja, which wins; how its authors draw from it, and the tokens that end
a response, are in generation_config.json.
"""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import Any

from jaxrl_pt import config, files
from jaxrl_pt.data.chat import ChatTemplate, encode_conversation, prompt_ids
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError, shown

_TOKENIZER_CONFIG, _GENERATION_CONFIG = 'tokenizer_config.json', 'generation_config.json'
_TEMPLATE = 'chat_template.jinja'
# The tokens that transformers tells a template of.
_TOLD = ('bos_token', 'eos_token', 'pad_token', 'unk_token', 'sep_token', 'cls_token', 'mask_token')
_TOOL = {'type': 'function', 'function': {
    'name': 'a', 'description': 'a', 'parameters': {
        'type': 'object', 'properties': {'a': {'type': 'string', 'description': 'a'}},
        'required': ['a']}}}
_PLAIN = '''
{{- bos_token }}
{%- set is_led = messages[0].role in ['system', 'developer'] %}
{%- if is_led %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{%- if tools %}
  {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are '
      + 'provided with function signatures within <tools></tools> XML tags:\\n<tools>\\n' }}
  {%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}
  {{- '</tools>\\n\\nFor each function call, return a json object with function name and arguments '
      + 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, '
      + '"arguments": <args-json-object>}\\n</tool_call>\\n\\n' }}
{%- endif %}
{%- for message in messages %}
  {%- if message.role in ['system', 'developer'] %}
    {%- if not loop.first %}{{ message.content + '\\n\\n' }}{% endif %}
  {%- elif message.role == 'user' %}
    {{- 'User: ' + message.content + '\\n\\n' }}
  {%- elif message.role == 'tool' %}
    {{- 'Tool: <tool_response>\\n' + message.content + '\\n</tool_response>\\n\\n' }}
  {%- else %}
    {{- 'Assistant:' }}
    {%- if not message.is_drawn %}{{ ' ' }}{% endif %}
    {%- if message.content %}{{ message.content }}{% endif %}
    {%- for call in message.tool_calls %}
      {%- if message.content or not loop.first %}{{ '\\n' }}{% endif %}
      {{- '<tool_call>\\n' + {'name': call.function.name, 'arguments': call.function.arguments}
          | tojson + '\\n</tool_call>' }}
    {%- endfor %}
    {{- eos_token + '\\n\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
'''.strip()


def plain(tokenizer: Tokenizer) -> ChatTemplate:
  """The template of models that have none: plain text, in which end of text ends each answer."""
  written = {token: text for text, token in tokenizer.special_tokens.items()}
  begin = '' if tokenizer.bos_id is None else written.get(tokenizer.bos_id, '')
  return ChatTemplate(_PLAIN, variables=(('bos_token', begin),
                                         ('eos_token', written.get(tokenizer.eos_id, ''))),
                      name='the plain chat template', stop_texts=('\nUser:',))


def read(folder: Path) -> ChatTemplate | None:
  """The chat template of a Hugging Face folder; None where it has none.

  Raises:
    UserError: a file is damaged, or the template is none.
  """
  described = _object(folder / _TOKENIZER_CONFIG)
  path = folder / _TEMPLATE
  given: Any = _text(path) if path.is_file() else described.get('chat_template')
  where = path if path.is_file() else folder / _TOKENIZER_CONFIG
  if given is None:
    return None
  named = {'default': given} if isinstance(given, str) else _named(given, where)
  told = {name: _content(described.get(name)) for name in _TOLD}
  return ChatTemplate(
      named['default'], named.get('tool_use', ''),
      tuple((name, text) for name, text in told.items() if text is not None),
      f'the chat template in {where}')


def read_template(path: Path) -> ChatTemplate:
  """A chat template that an operator gives, which is told of no tokens yet.

  Raises:
    UserError: the file cannot be read or holds no template.
  """
  return ChatTemplate(_text(path), name=f'the chat template {path}')


def of_model(folder: Path | None, tokenizer: Tokenizer, given: ChatTemplate | None = None
             ) -> ChatTemplate:
  """The template of a model's conversations: the given one, else its own, else the plain one.

  Args:
    folder: the Hugging Face folder of the model; None, or a missing one, where it has none.
    tokenizer: of the model.
    given: an operator's template, which is told of the model's tokens.

  Raises:
    UserError: a file of the folder is damaged.
  """
  own = (None if folder is None else read(folder)) or plain(tokenizer)
  return own if given is None else dataclasses.replace(given, variables=own.variables)


def check(template: ChatTemplate, tokenizer: Tokenizer) -> None:
  """Asks for a first answer, so that a template that always fails is refused before it is used.

  Some templates want a system message, which a second try gives them. What one with another source
  for tools writes of a tool is looked at too.

  Raises:
    UserError: the template fails in each try.
  """
  asked = [{'role': 'user', 'content': 'a'}]
  for tools in [(), (_TOOL,)] if template.tool_source else [()]:
    try:
      prompt_ids(template, tokenizer, asked, tools)
    except UserError as error:
      try:
        prompt_ids(template, tokenizer, [{'role': 'system', 'content': 'a'}, *asked], tools)
      except UserError:
        raise UserError(f'{str(error).rstrip(".")}; mend the template, or leave it out to import '
                        'the model without one.') from error


def end_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
  """The tokens that end an answer: the model's, and the one by which the template ends a turn."""
  turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'a'}]
  try:
    last = encode_conversation(template, tokenizer, turns).tokens[-1:]
  except UserError:  # Some templates end no turn, or write it otherwise than they ask for it.
    last = []
  return tuple(dict.fromkeys((*tokenizer.stop_ids, *last)))


def stop_ids(folder: Path, settings: Mapping[str, Any]) -> list[int]:
  """The tokens that end a response, by generation_config.json or else by config.json.

  Args:
    folder: a Hugging Face folder.
    settings: its config.json.

  Raises:
    UserError: they are no ids.
  """
  path = folder / _GENERATION_CONFIG
  generation = _object(path)
  given = generation.get('eos_token_id')
  where = path if given is not None else folder / 'config.json'
  given = settings.get('eos_token_id') if given is None else given
  ids = given if isinstance(given, list) else [] if given is None else [given]
  for one in ids:
    if isinstance(one, bool) or not isinstance(one, int) or one < 0:
      raise UserError(f'{where} has eos_token_id = {shown(given)}: expected a token id or a list '
                      'of them.')
  return list(ids)


def sampling(folder: Path) -> dict[str, Any]:
  """How a model's authors draw from it: fields of `config.Sampler` by generation_config.json.

  Raises:
    UserError: the file is damaged, or holds a value that cannot be.
  """
  path = folder / _GENERATION_CONFIG
  given = _object(path)
  if given.get('do_sample') is False:
    return {'temperature': 0.0}
  own = {name: given[name] for name in ('temperature', 'top_k', 'top_p', 'min_p')
         if given.get(name) is not None}
  try:
    config.Sampler(**own)
  except UserError as e:
    raise UserError(f'{path} asks for what cannot be: {e}') from e
  return own


def _named(given: Any, where: Path) -> dict[str, str]:
  """The templates of a list of objects with a name and a template."""
  try:
    named = {one['name']: one['template'] for one in given}
  except (TypeError, LookupError):
    named = {}
  if not all(isinstance(text, str) for text in named.values()) or 'default' not in named:
    raise UserError(f'{where} has a chat_template that is neither a text nor a list of named '
                    'templates with one named "default": mend it, or leave it out.')
  return named


def _content(token: Any) -> Any:
  """A token of tokenizer_config.json, which may stand there with its properties."""
  text = token.get('content') if isinstance(token, dict) else token
  return text if isinstance(text, str) else None


def _text(path: Path) -> str:
  try:
    return path.read_bytes().decode('utf-8-sig')
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f'Cannot read the chat template {path} ({e}): give a file of Jinja2 in '
                    'UTF-8.') from e


def _object(path: Path) -> dict[str, Any]:
  """The JSON object in a file; an empty one where there is no file."""
  return files.read_object(path) if path.is_file() else {}
