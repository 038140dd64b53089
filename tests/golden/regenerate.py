"""Rewrites the resolved text of every shipped run file: `make golden`, then read the diff."""

from pathlib import Path

from jaxrl_pt import gin_bindings

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / 'gin'
_POD = ("cfg.ArrayRecord.glob = 'corpus/*.array_record'",
        "cfg.HuggingFaceTokenizer.path = 'tokenizer.json'",
        "cfg.HuggingFaceTokenizer.end_of_text = '<|endoftext|>'",
        "cfg.HuggingFaceTokenizer.begin_of_text = ''")
# What a user must add to a run file that leaves values open.
REQUIRED = {
    'grpo_7b': (*_POD, "cfg.RL.start_from = 'runs/policy'",
                "cfg.JsonlProblems.glob = 'problems.jsonl'"),
    'opo_7b': (*_POD, "cfg.RL.start_from = 'runs/policy'",
               "cfg.JsonlProblems.glob = 'problems.jsonl'"),
    'rpt_14b': (*_POD, "cfg.RPT.start_from = 'runs/policy'"),
    'short_rl_7b': (*_POD, "cfg.RL.start_from = 'runs/policy'"),
    'pretrain_2b4t': ("cfg.ArrayRecord.glob = 'corpus/*.array_record'",
                      "cfg.HuggingFaceTokenizer.path = 'tokenizer.json'"),
    'pretrain_small': ("cfg.TextFiles.glob = 'wikitext2/train.txt.gz'",
                       "cfg.Data.validation_glob = 'wikitext2/valid.txt'"),
}


def runs() -> list[str]:
  """Names of the shipped run files."""
  return sorted(path.stem for path in (ROOT / 'gin' / 'run').glob('*.gin'))


def resolved(name: str) -> str:
  """The resolved text of a shipped run file."""
  path = ROOT / 'gin' / 'run' / f'{name}.gin'
  return gin_bindings.load([str(path)], REQUIRED.get(name, ()))[1]


if __name__ == '__main__':
  for stale in GOLDEN.glob('*.gin'):
    stale.unlink()
  GOLDEN.mkdir(exist_ok=True)
  for run in runs():
    (GOLDEN / f'{run}.gin').write_text(resolved(run), encoding='utf-8')
  print(f'{len(runs())} resolved texts in {GOLDEN.relative_to(ROOT)}')
