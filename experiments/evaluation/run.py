"""WikiText-2 through lm-eval's task and through our own `eval`, on one small model.

    python experiments/evaluation/run.py --data ../shared/data/text-wikitext2 --work /tmp/evaluation

Trains the `small` shape in full precision for `--num_steps` steps, unless its work directory is
there, and evaluates it on the test articles three ways: lm-eval's `wikitext` (detokenised text,
counts of the text before that), the same over the text as it stands, and `eval` without tasks. The
last two read equal text, and differ in the ends of articles and in the last window of each. Results
go to results/wikitext2.json.
"""

import argparse
import json
from pathlib import Path
import re
import subprocess
import sys

RESULT = Path(__file__).parent / 'results' / 'wikitext2.json'
START = r'^ = [^=].* = $'
OWN = 'lm_eval.tasks.wikitext.preprocess_wikitext'
METRICS = ('metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, '
           '{metric: bits_per_byte}]\n')
LENGTH, VOCAB = 256, 1024


def command(*args: str) -> str:
  """Runs a command of jaxrl-pt and returns what it prints."""
  done = subprocess.run([sys.executable, '-m', 'jaxrl_pt.main', *args], capture_output=True,
                        text=True, check=False)
  if done.returncode:
    sys.exit(done.stderr)
  return done.stdout


def bindings(*settings: str) -> list[str]:
  return [x for setting in settings for x in ('--gin_bindings', setting)]


def train(data: Path, work: Path, num_steps: int) -> None:
  command('train', '--workdir', str(work / 'model'), '--gin_file', 'gin/base.gin',
          '--gin_file', 'gin/model/small.gin', '--gin_file', 'gin/data/wikitext2.gin',
          *bindings(
              'cfg.Run.objective = @cfg.NextToken()', 'cfg.AdamW.schedule = @cfg.Cosine()',
              'cfg.Cosine.peak_rate = 4e-3', f'cfg.Train.num_steps = {num_steps}',
              'cfg.Train.batch_size = 16', f'cfg.Data.seq_len = {LENGTH}',
              f'cfg.Model.vocab_size = {VOCAB}', f'cfg.TrainedBPE.vocab_size = {VOCAB}',
              f"cfg.TextFiles.glob = '{data}/train.txt.gz'",
              f"cfg.Data.validation_glob = '{data}/valid.txt'"))


def write_tasks(data: Path, folder: Path) -> int:
  """Writes the articles and two tasks over them; returns the number of articles."""
  folder.mkdir(exist_ok=True, parents=True)
  text = (data / 'test.txt').read_text(encoding='utf-8')
  starts = [0, *(found.start() for found in re.finditer(START, text, re.MULTILINE)), len(text)]
  pages = [text[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True) if text[a:b].strip()]
  (folder / 'pages.jsonl').write_text(
      ''.join(json.dumps({'page': page}) + '\n' for page in pages), encoding='utf-8')
  head = (f'dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/pages.jsonl}}}}\n'
          f'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\n{METRICS}')
  counts = f'process_results: !function {OWN}.process_results\n'
  (folder / 'wikitext2.yaml').write_text(
      f'task: wikitext2\n{head}{counts}doc_to_target: !function {OWN}.wikitext_detokenizer\n')
  (folder / 'plain.yaml').write_text(f'task: wikitext2_plain\n{head}{counts}doc_to_target: page\n')
  return len(pages)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', type=Path, required=True)
  parser.add_argument('--work', type=Path, required=True)
  parser.add_argument('--num_steps', type=int, default=300)
  args = parser.parse_args()
  data, work = args.data.absolute(), args.work.absolute()
  if not (work / 'model').exists():
    train(data, work, args.num_steps)
  num_articles = write_tasks(data, work / 'tasks')
  tasks = json.loads(command(
      'eval', '--workdir', str(work / 'model'), '--tasks', 'wikitext2,wikitext2_plain',
      '--include_path', str(work / 'tasks'), '--add_bos_token', 'false', '--json'))
  own = json.loads(command(
      'eval', '--workdir', str(work / 'model'), '--json',
      *bindings(f"cfg.Data.validation_glob = '{data}/test.txt'")))
  RESULT.parent.mkdir(exist_ok=True)
  RESULT.write_text(json.dumps({
      'num_steps': args.num_steps, 'articles': num_articles, 'max_length': tasks['max_length'],
      'versions_of': tasks['versions_of'],
      **{name: {metric.partition(',')[0]: value for metric, value in of.items()
                if isinstance(value, float)} for name, of in tasks['results'].items()},
      'eval': own}, indent=2) + '\n')
  print(RESULT.read_text())


if __name__ == '__main__':
  main()
