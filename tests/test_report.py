"""The report stands alone, says what the rows say, and escapes everything."""

import base64
from html.parser import HTMLParser
import math
from pathlib import Path
import re
import statistics

import matplotlib.image
import numpy as np
import pytest

from jaxrl_pt import metrics, report
from jaxrl_pt.errors import UserError


def make_run(workdir: Path, steps: int, rl: bool = False) -> None:
  workdir.mkdir(parents=True, exist_ok=True)
  with metrics.Writer(workdir, resume_step=0, num_steps=steps, tensorboard=False) as writer:
    for step in range(1, steps + 1):
      values = {'loss': 3 + 4 / step, 'learning_rate': 1e-3, 'grad_norm': 1.0}
      if rl:
        values |= {'reward': step / steps, 'mismatch': 1.0001, 'entropy': 2.0}
      if step % 5 == 0:
        values |= {'validation/loss': 3.1 + 4 / step, 'validation/bits_per_byte': 1 + 1 / step}
      if step == 3:
        values['grad_norm'] = math.nan
      writer.write(step, values, {'tokens_per_second': 1000.0 + step, 'seconds': 2.0})


class Page(HTMLParser):
  """Collects what a browser would act on, and checks that the tags nest."""

  VOID = {'meta', 'img'}

  def __init__(self, text: str):
    super().__init__()
    self.open: list[str] = []
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.text = ''
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if not self.open or self.open[-1] != 'style':
      self.text += data


def test_one_run_gives_plots_and_a_page_that_needs_nothing_else(tmp_path):
  make_run(tmp_path, 80)
  (tmp_path / 'config.gin').write_text('cfg.Run.seed = 7  # <&>')
  page = report.write_report(tmp_path)
  names = {p.name for p in (tmp_path / 'plots').iterdir()}
  assert names == {'loss.png', 'bits_per_byte.png', 'grad_norm.png', 'learning_rate.png',
                   'throughput.png'}
  parsed = Page(page.read_text())
  assert 'cfg.Run.seed = 7  # <&>' in parsed.text
  assert '80 optimiser steps in 160 s of training, at a median of 1,040 tokens/s' in parsed.text
  images = [a['src'] for tag, a in parsed.tags if tag == 'img']
  assert {base64.b64decode(src.split(',')[1]) for src in images} == {
      p.read_bytes() for p in (tmp_path / 'plots').iterdir()}
  links = [v for _, a in parsed.tags for k, v in a.items() if k in ('src', 'href')]
  assert all(v.startswith('data:image/png;base64,') for v in links)
  assert 'http' not in re.sub(r'base64,[^"]*', '', page.read_text())


def test_stages_and_sections(tmp_path):
  make_run(tmp_path / 'a', 12)
  make_run(tmp_path / 'b', 12, rl=True)
  page = report.write_report(
      tmp_path, stages={'Pre-training': tmp_path / 'a', 'RPT': tmp_path / 'b'},
      sections=[report.Section('Table', rows=[['split', 'after'], ['easy', '41.2 %']],
                               text='First.\n\nSecond.')])
  parsed = Page(page.read_text())
  assert [tag for tag, _ in parsed.tags].count('section') == 3
  assert parsed.text.index('Table') < parsed.text.index('Pre-training') < parsed.text.index('RPT')
  assert '<p>First.</p><p>Second.</p>' in page.read_text()
  assert '<td>easy</td><td class=number>41.2 %</td>' in page.read_text()
  assert {'pre_training_loss.png', 'rpt_reward.png', 'rpt_mismatch.png', 'rpt_entropy.png'} <= {
      p.name for p in (tmp_path / 'plots').iterdir()}


def test_all_text_is_escaped(tmp_path):
  make_run(tmp_path / 'run', 3)
  evil = '<script>alert("x")</script>&amp;<img src=x>'
  page = report.write_report(tmp_path, stages={evil: tmp_path / 'run'}, sections=[
      report.Section(evil, rows=[[evil, 'b'], ['c', evil]], text=evil)])
  parsed = Page(page.read_text())
  tags = [tag for tag, _ in parsed.tags]
  assert 'script' not in tags
  assert all(a['src'].startswith('data:') for tag, a in parsed.tags if tag == 'img')
  assert parsed.text.count(evil) == 5


def test_summary_is_first_and_last():
  rows = [{'step': 1, 'loss': 7.0, 'validation/accuracy': 0.25}, {'step': 2, 'loss': math.nan},
          {'step': 3, 'loss': 3.5}]
  assert report.summary_rows(rows) == [
      ['', 'first', 'last'],
      ['training loss, nats per token', '7.0000', '3.5000'],
      ['validation next-token accuracy', '25.00 %', '25.00 %']]
  assert report.summary_rows([{'step': 1, 'loss': 0.1, 'reward': 0.5}])[1:] == [
      ['reward', '0.5000', '0.5000']]


def test_a_plot_shows_its_curve(tmp_path):
  """More ink where there is more to draw, and none lost to a NaN."""
  def ink(rows):
    path, = report.write_plots(rows, tmp_path)
    image = matplotlib.image.imread(path)[..., :3]
    blue = np.abs(image - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.1
    return int(blue.sum()), image.shape
  rows = [{'step': s, 'entropy': s % 7 + 0.5} for s in range(1, 41)]
  few, shape = ink(rows[:2])
  many, _ = ink(rows)
  with_nan, _ = ink([*rows, {'step': 41, 'entropy': math.nan}])
  assert shape == (504, 921, 3) or shape == (504, 922, 3)
  assert many > few > 100 and with_nan == many


def test_smoothing_is_a_running_median():
  values = [float(v) for v in (5, 1, 100, 2, 3, 4, 0)]
  assert report._smooth(values, 3) == [3.0] + [
      statistics.median(values[i - 1:i + 2]) for i in range(1, 6)] + [2.0]
  ramp = [float(i) for i in range(100)]
  assert report._smooth(ramp, 20)[10:90] == ramp[10:90]
  assert report._smooth(ramp, 20)[0] == 2.0


def test_a_run_without_steps_and_a_directory_without_a_run(tmp_path):
  make_run(tmp_path / 'empty', 0)
  assert 'no finished step' in report.write_report(tmp_path / 'empty').read_text()
  with pytest.raises(UserError, match='cannot read .*metrics.jsonl'):
    report.write_report(tmp_path)


def test_unwritable_place_for_the_report(tmp_path):
  make_run(tmp_path / 'run', 2)
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write the report to .*file'):
    report.write_report(tmp_path / 'file', stages={'run': tmp_path / 'run'})
