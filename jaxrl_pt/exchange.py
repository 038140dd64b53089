"""The commands `import` and `export`: work directories from and to the formats of others."""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
from pathlib import Path
import shutil
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt import files, gin_bindings, params
from jaxrl_pt.checkpoint import Checkpointer
from jaxrl_pt.data import chat_files, gguf_vocabulary, token_table, tokenizer_json
from jaxrl_pt.data import tokenizer as tokenizers
from jaxrl_pt.errors import UserError
from jaxrl_pt.interop import gguf_file, peft
from jaxrl_pt.interop import huggingface as hf
from jaxrl_pt.interop import verify as verification
from jaxrl_pt.interop.huggingface_config import context_length, to_config
from jaxrl_pt.models import adapters
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.run import places, policy, saved
from jaxrl_pt.run import session as sessions
from jaxrl_pt.types import Params

_TOKENIZER_CONFIG = 'tokenizer_config.json'
# The scales of packed matrices, which their latent weights have but for rounding.
_SCALES = 'ternary_scales.json'
_LONGEST_EXAMPLE = 1024  # tokens
# What can be done where a file of an imported model is damaged.
_COPY = 'copy it again from the folder that was imported'
_IMPORT = 'import the model again'


# --- Import -----------------------------------------------------------------------


def import_model(source: Path, workdir: Path, adapter: Path | None = None) -> str:
  """Makes a work directory of a Hugging Face folder; it is whole or absent.

  Args:
    source: a folder with config.json, safetensors and tokenizer.json or tokenizer.model.
    workdir: the work directory, which must not exist.
    adapter: a folder of PEFT with low-rank adapters of the model; None gives it none.

  Returns:
    What was done, in words.

  Raises:
    UserError: a folder is not there, is damaged or holds a model or adapter that is not covered, or
      the work directory exists or cannot be written.
  """
  if not source.is_dir():
    raise UserError(f'{source} is no folder: download the model first, and give the folder with '
                    'its config.json.')
  with files.whole_directory(workdir) as folder:
    settings = hf.read_settings(source)
    config = to_config(settings, str(source / 'config.json'))
    tokenizer, setting = _tokenizer(source, settings, workdir)
    if tokenizer.vocab_size > config.vocab_size:
      raise UserError(f'The tokenizer in {source} has {tokenizer.vocab_size} tokens but the model '
                      f'has {config.vocab_size}: the files are not of one model.')
    mesh = make_mesh(cfg.Mesh())
    rules.check_divides(_run(config, setting, settings), mesh)
    lora = cfg.NoAdapter() if adapter is None else peft.read_settings(adapter)
    config = dataclasses.replace(config, adapter=lora)
    config, values = hf.load_model(source, mesh)  # Refusals come before anything large is read.
    if adapter is not None:
      config, values = _adapted(dataclasses.replace(config, adapter=lora), values, adapter, mesh)
    run, scales = _run(config, setting, settings), hf.stored_scales(source)
    with _writing(workdir):
      tokenizer.save(folder / places.TOKENIZER)
      data = sessions.policy_data(run, folder, {'tokenizer': tokenizer.fingerprint})
      session = sessions.open_session(run, folder, gin_bindings.dump(run), data=data)
      _carry(source, folder / places.CARRIED)
      if scales:
        files.write_text(folder / places.CARRIED / _SCALES, json.dumps(scales, indent=2) + '\n')
      extras = {**saved.checkpoint_extras(session, {}), 'objective': 'Imported',
                'data': {'absolute': str(workdir.absolute() / 'data'), 'relative': 'data'}}
      with Checkpointer(folder / places.CHECKPOINTS, run.checkpoint) as checkpointer:
        checkpointer.save(0, {'params': values}, extras)
      saved.record(session, 0)
  count = params.count(session.model(config).specs)
  return (f'Imported {settings["model_type"]} of {count:,} parameters in {config.param_dtype} to '
          f'{workdir}; go on with: jaxrl-pt sample --workdir {workdir} --prompt "…"')


@contextlib.contextmanager
def _writing(workdir: Path) -> Iterator[None]:
  """Says of a disk that fails what a user can do, who knows nothing of the hidden directory.

  Raises:
    UserError: the work directory cannot be written.
  """
  try:
    yield
  except UserError as error:
    reason = files.reason_of(error.__cause__)
    if reason is None:
      raise
    raise UserError(f'{workdir} cannot be written ({reason}): free some space or choose another '
                    'place.') from error


def _adapted(config: cfg.Model, values: Params, folder: Path, mesh: Mesh
             ) -> tuple[cfg.Model, Params]:
  """The parameters of a model with the adapters of a folder; `config` names them already."""
  specs = models.build(config, cfg.Compute(), mesh).specs
  loaded = peft.load(folder, specs, mesh)
  adapt = jax.jit(lambda params: adapters.adapt(specs, params, jax.random.key(0)),
                  out_shardings=rules.param_shardings(specs, mesh))
  return config, params.joined(adapt(values), loaded)


def _run(config: cfg.Model, tokenizer: cfg.Tokenizer, settings: dict[str, Any]) -> cfg.Run:
  """The run that the work directory records.

  Its text is the standard library's, on which `eval` measures unless it is given other data.
  """
  longest = settings.get('max_position_embeddings')
  seq_len = min(longest, _LONGEST_EXAMPLE) if isinstance(longest, int) else _LONGEST_EXAMPLE
  return cfg.Run(
      seed=0, model=config, data=cfg.Data(cfg.PythonStdlib(), tokenizer, max(seq_len, 2)),
      objective=cfg.NextToken(), optimizer=cfg.AdamW(cfg.ConstantRate(1e-5)),
      train=cfg.Train(num_steps=1, batch_size=8), compute=cfg.Compute(dtype=config.param_dtype))


def _tokenizer(source: Path, settings: dict[str, Any], workdir: Path
               ) -> tuple[tokenizers.Tokenizer, cfg.Tokenizer]:
  """The folder's tokenizer, and the setting that names its copy in the work directory."""
  home = (workdir / places.TOKENIZER).absolute()
  own = source / _TOKENIZER_CONFIG
  described = files.read_object(own) if own.exists() else {}
  path = source / token_table.DEFINITION['tokenizer.json']
  if path.exists():
    setting: cfg.HuggingFaceTokenizer | cfg.SentencePiece = cfg.HuggingFaceTokenizer(
        str(path), _end_of_text(path, described, settings), _begin_of_text(path, described))
  elif (path := source / token_table.DEFINITION['sentencepiece']).exists():
    setting = cfg.SentencePiece(str(path), described.get('add_bos_token') is not False)
  else:
    raise UserError(f'{source} holds neither tokenizer.json nor tokenizer.model: download the '
                    "model's tokenizer into it.")
  stops = _stop_tokens(source, settings, tokenizers.train_or_load(setting, ()))
  try:
    setting = dataclasses.replace(setting, stop_tokens=stops)
  except UserError as e:
    raise UserError(f'{source} names {len(stops)} tokens that end a response, beside the end of '
                    f'text: {e}') from e
  return (tokenizers.train_or_load(setting, ()),
          dataclasses.replace(setting, path=str(home / path.name)))


def _stop_tokens(source: Path, settings: dict[str, Any], tokenizer: tokenizers.Tokenizer
                 ) -> tuple[str, ...]:
  """The tokens that end a response beside the end of text.

  They are those of generation_config.json, or else of config.json, and the one by which the chat
  template ends an answer. An id that no token has can never be drawn.
  """
  chat_files.sampling(source)  # A damaged file is told before anything large is read.
  written = {token: text for text, token in tokenizer.special_tokens.items()}
  path = source / token_table.DEFINITION['tokenizer.json']
  name = lambda token: written.get(token) or (
      tokenizer_json.token_of(path, token) if path.exists() else None)
  ids = chat_files.stop_ids(source, settings)
  if (template := chat_files.read(source)) is not None:
    chat_files.check(template, tokenizer)
    ids += chat_files.end_tokens(template, tokenizer)
  return tuple(dict.fromkeys(text for token in ids if token != tokenizer.eos_id
                             if (text := name(token)) is not None))


def _begin_of_text(path: Path, described: dict[str, Any]) -> str:
  """The token that begins a text, '' for none.

  If tokenizer_config.json says whether there is one, that counts, since transformers changes the
  post-processor of tokenizer.json accordingly; otherwise the post-processor itself does.
  """
  match described.get('add_bos_token'), _content(described.get('bos_token')):
    case False, _:
      return ''
    case True, str(token):
      return token
    case _:
      return tokenizer_json.begin_of_text(path)


def _content(token: Any) -> Any:
  """A token of tokenizer_config.json, which may stand there with its properties."""
  return token.get('content') if isinstance(token, dict) else token


def _end_of_text(path: Path, described: dict[str, Any], settings: dict[str, Any]) -> str:
  """The token that ends a text, as tokenizer_config.json or config.json name it."""
  token = _content(described.get('eos_token'))
  ids = settings.get('eos_token_id')
  first = ids[0] if isinstance(ids, list) and ids else ids
  if not isinstance(token, str) and isinstance(first, int):
    token = tokenizer_json.token_of(path, first)
  if not isinstance(token, str) or not token:
    raise UserError(f'Neither eos_token in {_TOKENIZER_CONFIG} nor eos_token_id in config.json of '
                    f'{path.parent} names a token of tokenizer.json: write one of them.')
  return token


def _carry(source: Path, folder: Path) -> None:
  """Copies the small files of a Hugging Face folder, for an export to write them again."""
  folder.mkdir()
  for name in places.SMALL_FILES:
    if (source / name).is_file():
      shutil.copyfile(source / name, folder / name)


# --- Export -----------------------------------------------------------------------


def export_model(workdir: Path, destination: Path, *, step: int | None, packed: bool,
                 verify: bool) -> str:
  """Writes a work directory's model and tokenizer as a Hugging Face folder, whole or not at all.

  Args:
    workdir: a work directory.
    destination: the folder, which must not exist.
    step: the checkpoint's step; None takes the newest good one.
    packed: whether ternary weights are stored in 2 bits.
    verify: whether transformers has to compute the same logits.

  Returns:
    What was done, in words.

  Raises:
    UserError: no checkpoint, a model that no Hugging Face class computes, a folder that exists or
      cannot be written, or other logits.
  """
  with files.whole_directory(destination) as folder:
    trained = policy.load_policy(workdir, step)
    tokenizer, (config, values) = trained.session.data.tokenizer, _merged(trained)
    hf.save_model(folder, config, values, packed=packed, bos_id=tokenizer.bos_id,
                  eos_id=tokenizer.eos_id, scales=_scales(workdir / places.CARRIED),
                  longest=_longest(workdir / places.CARRIED))
    said = [f'Exported step {trained.step} of {workdir} to {destination}.']
    if not _write_tokenizer(tokenizer, workdir / places.CARRIED, folder):
      said.append('Its tokenizer has no Hugging Face form and was left out.')
    if verify:
      difference = verification.check(folder, config, values)
      said.append(f'Its logits in transformers differ by {difference:.1e} at most.')
  return ' '.join(said)


def _merged(trained: policy.Policy) -> tuple[cfg.Model, Params]:
  """The model without adapters, and the parameters with which it computes the same."""
  config, values = trained.model.config, trained.params
  if config.adapter == cfg.NoAdapter():
    return config, values
  return dataclasses.replace(config, adapter=cfg.NoAdapter()), adapters.merged(values)


def export_adapter(workdir: Path, destination: Path, *, step: int | None) -> str:
  """Writes a work directory's low-rank adapters as a folder of PEFT, whole or not at all.

  Args:
    workdir: a work directory.
    destination: the folder, which must not exist.
    step: the checkpoint's step; None takes the newest good one.

  Returns:
    What was done, in words.

  Raises:
    UserError: no checkpoint, a model without adapters, or a folder that exists or cannot be
      written.
  """
  with files.whole_directory(destination) as folder:
    trained = policy.load_policy(workdir, step)
    adapter = trained.model.config.adapter
    if not isinstance(adapter, cfg.LoRA):
      raise UserError(f'--format peft: the model in {workdir} has no adapters; export it with '
                      '--format hf.')
    peft.save(folder, adapter, trained.model.specs, trained.params)
  return (f'Exported the adapters of step {trained.step} of {workdir} to {destination}; they '
          'belong to the model that the run started from.')


def export_gguf(workdir: Path, destination: Path, *, step: int | None,
                ternary_type: gguf_file.TernaryType, verify: bool) -> str:
  """Writes a work directory's model and tokenizer as a GGUF file, whole or not at all.

  Args:
    workdir: a work directory.
    destination: the file, which must not exist.
    step: the checkpoint's step; None takes the newest good one.
    ternary_type: how ternary weights are stored.
    verify: whether the file is read again and compared.

  Returns:
    What was done, in words.

  Raises:
    UserError: no checkpoint, a model that llama.cpp does not compute, a file that exists or cannot
      be written, or other numbers in it.
  """
  with files.whole_file(destination) as path:
    trained = policy.load_policy(workdir, step)
    tokenizer, (config, values) = trained.session.data.tokenizer, _merged(trained)
    keys = gguf_file.metadata(config, ternary_type, workdir.absolute().name,
                              _longest(workdir / places.CARRIED) or context_length(config))
    vocabulary = gguf_vocabulary.metadata(tokenizer, config.vocab_size, tokenizer.stop_ids)
    keys |= vocabulary or {'tokenizer.ggml.model': 'none'}
    if template := chat_files.read(workdir / places.CARRIED):
      keys['tokenizer.chat_template'] = template.source
    num_f16 = gguf_file.save_model(path, config, values, keys, ternary_type)
    said = [f'Exported step {trained.step} of {workdir} to {destination}.']
    if not vocabulary:
      said.append('llama.cpp would not encode text as its tokenizer does, which was left out.')
    if num_f16:
      said.append(f'{num_f16} ternary matrices are no multiple of 256 wide and stored as F16.')
    if verify:
      difference = verification.check_gguf(path, config, values, keys, ternary_type)
      said.append('Read back, its tensors are the same up to the rounding of scales to float16; '
                  f'logits differ by {difference:.1e} of the largest.')
  return ' '.join(said)


def _longest(carried: Path) -> int | None:
  """Tokens of the longest text that an imported model is for; None if it was trained here."""
  path = carried / 'config.json'
  longest = files.read_object(path, _COPY).get('max_position_embeddings') if path.exists() else None
  return longest if isinstance(longest, int) and longest > 0 else None


def _scales(carried: Path) -> dict[str, float] | None:
  """The scales of an imported packed model by the names of their codes; None for other models."""
  path = carried / _SCALES
  scales = files.read_object(path, _IMPORT) if path.exists() else None
  if scales is not None and any(type(scale) is not float for scale in scales.values()):
    raise UserError(f'{path} holds a scale that is no number: {_IMPORT}.')
  return scales


def _write_tokenizer(tokenizer: tokenizers.Tokenizer, carried: Path, folder: Path) -> bool:
  """Writes the tokenizer's files, those of an imported model as they were; False if none exist."""
  match tokenizer:
    case tokenizers.ByteTokenizer():
      return False
    case tokenizers.JsonTokenizer(end_of_text=end, begin_of_text=begin):
      tokenizer.save(folder)
      own = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': end,
             'bos_token': begin or None}
      (folder / _TOKENIZER_CONFIG).write_text(json.dumps(own, indent=2) + '\n', encoding='utf-8')
    case _:
      tokenizer.save(folder)
      (folder / _TOKENIZER_CONFIG).unlink()
  for path in carried.iterdir() if carried.is_dir() else ():
    if path.name not in ('config.json', _SCALES):
      shutil.copyfile(path, folder / path.name)
  return True
