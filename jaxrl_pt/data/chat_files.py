"""Where chat templates come from: the small files of a Hugging Face folder, or a plain default."""

import json
from pathlib import Path
from typing import Any

from jaxrl_pt.data.chat import ChatTemplate
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError

# The turns that the server writes for a model without a template, each answer with its end.
_PLAIN = (
    '{{ bos_token }}{% for message in messages %}'
    "{% if message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n\n"
    "{% elif message.role == 'user' %}User: {{ message.content }}\n\n"
    "{% elif message.role == 'tool' %}Tool: {{ message.content }}\n\n"
    '{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}'
    '{% if add_generation_prompt %}Assistant:{% endif %}')


def plain(tokenizer: Tokenizer) -> ChatTemplate:
  """The template for a model that comes without one."""
  texts = {token: text for text, token in tokenizer.special_tokens.items()}
  begin = '' if tokenizer.bos_id is None else texts.get(tokenizer.bos_id, '')
  return ChatTemplate(_PLAIN, variables=(('bos_token', begin),
                                         ('eos_token', texts.get(tokenizer.eos_id, ''))),
                      name='the plain template')


def read(folder: Path) -> ChatTemplate | None:
  """The template of a Hugging Face folder, or None if it has none.

  `chat_template.jinja` goes before `chat_template` of tokenizer_config.json, which is one text or a
  list of templates by name, of which 'default' and 'tool_use' are taken.

  Raises:
    UserError: a file is damaged, or the template is none.
  """
  config, own = folder / 'tokenizer_config.json', folder / 'chat_template.jinja'
  settings = _settings(config)
  named = settings.get('chat_template')
  sources = {'default': named} if isinstance(named, str) else {
      each.get('name'): each.get('template') for each in named or () if isinstance(each, dict)}
  if own.is_file():
    sources['default'] = _text(own)
  source, tool_source = sources.get('default'), sources.get('tool_use') or ''
  if source is None:
    return None
  if not isinstance(source, str) or not isinstance(tool_source, str):
    raise UserError(f'{config}: chat_template is no text: mend it, or take it out.')
  tokens = {name: value.get('content') if isinstance(value, dict) else value
            for name, value in settings.items() if name.endswith('_token')}
  variables = tuple(sorted((k, v) for k, v in tokens.items() if isinstance(v, str)))
  return ChatTemplate(source, tool_source, variables,
                      str(own if own.is_file() else config))


def _text(path: Path) -> str:
  try:
    return path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'Cannot read {path}: {error}.') from error


def _settings(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    found = json.loads(_text(path))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not JSON: {error}.') from error
  if not isinstance(found, dict):
    raise UserError(f'{path} holds no JSON object: copy it again.')
  return found
