"""The tokenizer for clients, as vLLM's servers give it: /tokenize, /detokenize, /tokenizer_info.

Who evaluates with token ids, such as lm-eval's `local-completions`, needs no copy of the tokenizer.
"""

from typing import Any

from jaxrl_pt.data.tokenizer import begun
from jaxrl_pt.serving.fields import Fields, is_integer, is_text
from jaxrl_pt.serving.protocol import Service, check_model


def tokenize(body: dict[str, Any], service: Service) -> dict[str, Any]:
  """The ids of a text.

  Special tokens written in it stay text, as in any prompt; a text that is one special token and
  nothing else is that token.

  Raises:
    ApiError: 400 for a body that is malformed, 404 for another model.
  """
  fields = Fields(body)
  check_model(fields, service)
  text = fields.need('prompt', 'a text', lambda x: x == '' or is_text(x))
  begins = fields.flag('add_special_tokens', True)
  fields.refuse('return_token_strs', False)
  fields.finish()
  tokenizer = service.tokenizer
  special = tokenizer.special_tokens.get(text)
  ids = tokenizer.encode(text) if special is None else [special]
  if begins and (ids or tokenizer.bos_id is not None):
    ids = begun(tokenizer, ids)
  return {'tokens': ids, 'count': len(ids), 'max_model_len': max_len(service)}


def detokenize(body: dict[str, Any], service: Service) -> dict[str, Any]:
  """The text of ids.

  Raises:
    ApiError: 400 for a body that is malformed, 404 for another model.
  """
  fields = Fields(body)
  check_model(fields, service)
  ids = fields.need('tokens', f'a list of token ids below {service.vocab_size}', lambda x: (
      isinstance(x, list) and all(is_integer(i) and 0 <= i < service.vocab_size for i in x)))
  fields.finish()
  return {'prompt': service.tokenizer.decode(ids)}


def info(service: Service) -> dict[str, Any]:
  """How the special tokens are written that begin and end a document."""
  written = {token: text for text, token in service.tokenizer.special_tokens.items()}
  bos_id = service.tokenizer.bos_id
  return {'eos_token': written.get(service.tokenizer.eos_id),
          'bos_token': None if bos_id is None else written.get(bos_id),
          'pad_token': None, 'chat_template': None, 'model_max_length': max_len(service)}


def max_len(service: Service) -> int:
  """The largest number of tokens of a prompt and its response."""
  return service.engine.prompt_len + service.engine.response_len
