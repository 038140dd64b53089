"""Sampled answers as pairs, by their verifier and by a judge, and the DPO step that reads them."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrl_pt.main import main
from tests.e2e.conftest import PRETRAIN, RL, WORDS

# A response is right if it has two words or more.
SPACED = RL.replace('cfg.RL.verifier = @cfg.LengthVerifier()', """
cfg.RL.verifier = @cfg.PythonVerifier()
cfg.PythonVerifier.target = 'tests.e2e.slow_verifier:has_two_words'
""").replace('cfg.LengthVerifier.min_chars = 2\ncfg.LengthVerifier.max_chars = 9\n', '').replace(
    '@cfg.Arithmetic()', '@cfg.JsonlProblems()').replace('cfg.Arithmetic.size = 200',
                                                         "cfg.JsonlProblems.glob = '{problems}'")
BARE = ("cfg.JudgePrompt.system = ''", 'cfg.JudgePrompt.verdict = @cfg.MarkedVerdict()',
        r"cfg.JudgePrompt.template = '{query}\nA {first}\nB {second}\n?'")
DPO = PRETRAIN.replace('@cfg.NextToken()', '@cfg.DPO()').replace(
    'cfg.Data.source = @cfg.TextFiles()', 'cfg.Data.source = @cfg.Preferences()').replace(
        "cfg.TextFiles.glob = '{corpus}/*.txt'", "cfg.Preferences.glob = '{pairs}'\n"
        "cfg.DPO.start_from = '{start_from}'\ncfg.Data.long_documents = 'cut'").replace(
            '@cfg.Bytes()', '@cfg.PolicyTokenizer()')


def rows(path: str) -> list[dict]:
  return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.slow
def test_answers_are_paired_and_the_pairs_are_learned_from(pretrained, make_job, tmp_path, capsys):
  asked = [WORDS[i][:7] + ' ' + WORDS[j][:3] for i in range(5) for j in range(5)]
  problems = tmp_path / 'problems.jsonl'
  problems.write_text(''.join(json.dumps({'question': one, 'answer': '-'}) + '\n' for one in asked))
  run = make_job(SPACED, start_from=str(pretrained.workdir), problems=str(problems))
  files = {name: str(tmp_path / f'{name}.jsonl') for name in ('pairs', 'candidates', 'judged')}
  flags = ['--workdir', str(pretrained.workdir)]
  answers = ['answers', *flags, '--gin_file', str(run.gin_file), '--num_samples', '6', '--limit',
             '12', '--temperature', '0.7', '--most_pairs', '2']
  assert main([*answers, '--candidates', files['candidates'], '--pairs', files['pairs']]) == 0
  said = capsys.readouterr().out
  found, paired = rows(files['candidates']), rows(files['pairs'])
  texts = {row['prompt']: row['candidates'] for row in found}
  right = {(row['prompt'], text): is_right for row in found
           for text, is_right in zip(row['candidates'], row['correct'], strict=True)}
  assert f'{len(paired)} pairs in' in said and f'{len(found)} rows of candidates' in said
  assert all(right[p['prompt'], p['chosen']] and not right[p['prompt'], p['rejected']]
             for p in paired)
  assert 0 < len(paired) and max(sum(p['prompt'] == q for p in paired) for q in texts) <= 2
  judging = ['judge', *flags, files['candidates'], '--direct', '--num_tokens', '2',
             *(flag for line in BARE for flag in ('--gin_bindings', line))]
  assert main([*judging, '--tournament', 'round_robin', '--pairs', files['judged']]) == 0
  said, preferred = capsys.readouterr().err, rows(files['judged'])
  assert f'{len(preferred)} pairs in {files["judged"]}' in said and preferred
  assert all({p['chosen'], p['rejected']} <= set(texts[p['prompt']]) for p in preferred)
  assert main([*judging[:3], files['pairs'], '--pairs', files['judged']]) == 2  # They are pairs.
  for name in ('pairs', 'judged'):
    learned = make_job(DPO, start_from=str(pretrained.workdir), pairs=files[name], bindings=(
        'cfg.Train.num_steps = 1', 'cfg.Train.batch_size = 2', 'cfg.Data.seq_len = 48',
        'cfg.Data.validation_fraction = 0.0'))
    done = learned.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert np.isfinite(learned.rows()[-1]['loss'])
