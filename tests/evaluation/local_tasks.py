"""Files of tasks for lm-eval, and a tokenizer for the models that take them."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers


def tokenizer_of(texts: Sequence[str], *, begins: bool) -> tokenizers.Tokenizer:
  """A byte-level BPE of 290 pieces with <s> and </s>; `begins` puts <s> before every text."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
      vocab_size=290, special_tokens=['<s>', '</s>'], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  if begins:
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 0)])
  return backend


def write_task(folder: Path, name: str, settings: str) -> None:
  """Writes a task over `rows.jsonl`, whose settings may be set once more."""
  (folder / f'{name}.yaml').write_text(
      f'task: {name}\ndataset_path: json\ntest_split: test\n'
      f'dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n{settings}\n')
