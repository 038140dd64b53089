"""Files of tasks for lm-eval."""

from pathlib import Path


def write_task(folder: Path, name: str, settings: str) -> None:
  """Writes a task over `rows.jsonl`, whose settings may be set once more."""
  (folder / f'{name}.yaml').write_text(
      f'task: {name}\ndataset_path: json\ntest_split: test\n'
      f'dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n{settings}\n')
