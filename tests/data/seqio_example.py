"""A real seqio Task and Mixture over text files, registered on import for test_seqio_tasks."""

import os

import seqio

_DIRECTORY = os.environ['JAXRL_PT_TEST_SEQIO']
_VOCABULARY = seqio.SentencePieceVocabulary(f'{_DIRECTORY}/sentencepiece.model')
_EXTRA = seqio.SentencePieceVocabulary(f'{_DIRECTORY}/sentencepiece.model', extra_ids=4)


def _task(name: str, splits: dict[str, str], vocabulary: seqio.Vocabulary) -> None:
  seqio.TaskRegistry.add(
      name,
      source=seqio.TextLineDataSource(splits),
      preprocessors=[lambda ds: ds.map(lambda line: {'targets': line}),
                     seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features={'targets': seqio.Feature(vocabulary, add_eos=True)})


_task('lines', {'train': f'{_DIRECTORY}/train.txt'}, _VOCABULARY)
_task('lines_split', {'train': f'{_DIRECTORY}/train.txt',
                      'validation': f'{_DIRECTORY}/validation.txt'}, _VOCABULARY)
_task('lines_extra', {'train': f'{_DIRECTORY}/train.txt'}, _EXTRA)
_task('lines_bytes', {'train': f'{_DIRECTORY}/train.txt'}, seqio.ByteVocabulary())
_task('lines_untrained', {'test': f'{_DIRECTORY}/train.txt'}, _VOCABULARY)
seqio.MixtureRegistry.add('mixed', [('lines', 1.0), ('lines_split', 1.0)])
