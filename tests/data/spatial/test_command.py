"""`jaxrl-pt spatial`: what it prints and writes, and its mistakes."""

import json

from PIL import Image
import pytest

from jaxrl_pt import main as cli
from jaxrl_pt import spatial_flags
from jaxrl_pt.data.spatial import base, items


def test_the_command_prints_and_grades(capsys):
  item = items.item(items.named('direction'), 2, 'train', 0, 5, 48)
  asked = ['spatial', '--task', 'direction', '--level', '2', '--index', '5']
  assert cli.main([*asked, '--answer', item.answer]) == 0
  out = capsys.readouterr().out
  for expected in ('direction, level 2, train, item 5', item.question, item.state,
                   ', '.join(item.options), f'answer    {item.answer} (by chance 0.125)',
                   'grade     correct, score 1.00'):
    assert expected in out
  assert cli.main([*asked, '--answer', 'nowhere', '--json', '--twin']) == 0
  found, = json.loads(capsys.readouterr().out)
  assert found['grade'] == {'correct': False, 'score': 0.0, 'valid': False}
  assert found['answer'] != item.answer and found['question'] == item.question


def test_pictures_are_written(tmp_path, capsys):
  one, sheet = tmp_path / 'one.png', tmp_path / 'sheet.png'
  assert cli.main(['spatial', '--task', 'count', '--split', 'size', '--picture', str(one)]) == 0
  assert 'count, level 4, size' in capsys.readouterr().out
  item = items.item(items.named('count'), 4, 'size', 0, 0, 48)
  with Image.open(one) as picture:
    assert picture.size == (240, 240)
    assert picture.getpixel((102, 52)) == tuple(item.pictures[0, 10, 20])
  assert cli.main(['spatial', '--task', 'all', '--picture', str(sheet)]) == 0
  assert capsys.readouterr().out.count('question  ') == len(items.TASKS)
  with Image.open(sheet) as picture:
    assert picture.width > 900 and picture.height > 500


def test_the_splits_of_the_flag_are_those_of_items():
  assert spatial_flags.SPLITS == base.SPLITS


@pytest.mark.parametrize('args, expected', [
    (('--task', 'chess'), "no task 'chess'"), (('--task', 'order', '--level', '9'), 'not 9'),
    (('--task', 'order', '--split', 'dev'), 'invalid choice'),
    (('--task', 'order', '--split', 'composition'), 'only program composes'),
    (('--task', 'order', '--side', '12'), '48 to 1024'),
    (('--task', 'order', '--picture', 'x.jpg'), 'name it *.png'),
    (('--task', 'order', '--picture', '/dev/null/x.png'), 'x.png'), ((), '--task')])
def test_a_mistake_is_one_sentence(args, expected, capfd):
  assert cli.main(['spatial', *args]) == 2
  out, err = capfd.readouterr()
  assert out == '' and err.count('\n') == 1 and expected in err
