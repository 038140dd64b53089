"""The page on which a model of a game is played: its server, its games, and a browser at it."""

import base64
from concurrent.futures import ThreadPoolExecutor
import contextlib
import http.client
import importlib.util
import json
import shutil
import socket
import threading
import time

import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import main as cli
from jaxrl_pt.errors import UserError
from jaxrl_pt.playing import command, rooms
from jaxrl_pt.playing.server import Server

JSON = {'Content-Type': 'application/json'}
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')


@contextlib.contextmanager
def _served(config=None, host='127.0.0.1'):
  stage, about = command.rendered(config or cfg.Traveler(num_cells=24), 'weak', None)
  with Server(host, 0, rooms.Rooms(stage), rooms.facts(stage, about)) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()


def _ask(server, method, path, body=None, headers=None):
  connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
  try:
    connection.request(method, path, body if isinstance(body, str) else json.dumps(body),
                       JSON if headers is None else headers)
    answer = connection.getresponse()
    content = answer.read()
    is_json = answer.headers.get_content_type() == 'application/json'
    return answer.status, json.loads(content) if is_json else content.decode()
  finally:
    connection.close()


@pytest.fixture(scope='module')
def server():
  with _served() as server:
    yield server


def test_page_and_facts(server):
  status, page = _ask(server, 'GET', '/')
  assert status == 200 and '<canvas id="dream">' in page and 'http' + '://' not in page
  status, facts = _ask(server, 'GET', '/facts')
  assert status == 200 and facts['actions'] == ['left', 'stay', 'right'] and facts['has_map']
  assert [c['name'] for c in facts['contents'] if c['settled']] == [
      'red', 'green', 'blue', 'yellow', 'magenta', 'teal']
  with _served(cfg.Pong()) as pong:
    assert not _ask(pong, 'GET', '/facts')[1]['has_map']


@pytest.mark.parametrize('path, body, headers, status, expected', [
    ('/games/x/step', {'action': 1}, JSON, 404, 'start a new one'),
    ('/nothing', {}, JSON, 404, 'nothing at /nothing'),
    ('/games', '{"seed": ', JSON, 400, 'That is not JSON'),
    ('/games', '[' * 5000, JSON, 400, 'That is not JSON'),
    ('/games', [1], JSON, 400, 'Send a JSON object'),
    ('/games', 'x' * 20000, JSON, 413, 'at most 16384'),
    ('/games', {}, {}, 415, 'Content-Type: application/json'),
    ('/games', {}, {**JSON, 'Host': 'evil.example:80'}, 403, 'Only requests to this machine'),
    ('/games', {'seed': -1}, JSON, 400, 'A seed is a whole number from 0'),
    ('/games', {'seed': True}, JSON, 400, 'A seed is a whole number from 0')])
def test_a_wrong_request_gets_one_sentence(server, path, body, headers, status, expected):
  found, answer = _ask(server, 'POST', path, body, headers)
  assert found == status and expected in answer['error']


def test_two_servers_at_one_port_are_refused(server, capfd):
  port = server.server_address[1]
  code = cli.main(['play', '--game', 'traveler', '--port', str(port)])
  said = capfd.readouterr().err
  assert code == 2 and f'Cannot listen at 127.0.0.1:{port}' in said and 'Traceback' not in said


@pytest.mark.parametrize('arguments, expected', [
    (('--port', '1'), '--port does nothing without --workdir or --game'),
    (('--game', 'chess'), 'gin/game/chess.gin'),
    (('--game', 'pong', '--environment', 'calculator'), '--environment is for environments'),
    (('--game', 'pong', '--workdir', 'nowhere'), 'leave --game out'),
    (('--workdir', 'nowhere'), 'nowhere holds no config.gin'),
    (('--game', 'pong', '--gin_bindings', 'cfg.MaaG.map = @cfg.MapMemory()'), 'Pong has no map')])
def test_wrong_flags_are_told(arguments, expected, capfd):
  assert cli.main(['play', *arguments]) == 2
  assert expected in capfd.readouterr().err


def test_others_need_the_token():
  with _served(host='0.0.0.0') as server:
    host, port = '127.0.0.1', server.server_address[1]
    for token, status in (('', 401), ('Bearer no', 401), (f'Bearer {server.token}', 200)):
      connection = http.client.HTTPConnection(host, port, timeout=10)
      connection.request('GET', '/facts', headers={'Authorization': token})
      assert connection.getresponse().status == status
      connection.close()
    assert server.url.endswith(f'#{server.token}') and len(server.token) > 20


def test_an_address_of_nobody_is_refused():
  stage, _ = command.rendered(cfg.Traveler(num_cells=24), 'weak', None)
  with pytest.raises(UserError, match='Cannot listen at 192.0.2.1:0'):
    Server('192.0.2.1', 0, rooms.Rooms(stage), {})


# --- Games ------------------------------------------------------------------------


def _frame(state, name='frame', shape=(24, 32, 3)):
  return np.frombuffer(base64.b64decode(state[name]), np.uint8).reshape(shape)


@pytest.mark.slow
def test_a_game_is_played_edited_and_switched(server):
  _, opened = _ask(server, 'POST', '/games', {'seed': 5})
  do = lambda verb, **body: _ask(server, 'POST', f'/games/{opened["id"]}/{verb}', body)
  score = opened['values'][0]
  state = opened
  for number in range(1, 4):
    status, state = do('step', action=2)
    assert status == 200 and state['values'] == state['read'] == [(score + number) % 1000]
    assert state['predicted'] == state['true_event'] == 'built' and state['number'] == number
  assert not (_frame(state) == _frame(opened)).all()
  assert (_frame(state) == _frame(state, 'true_frame')).mean() > 0.7
  here = state['origin'][1] + 3
  assert state['cells'][0][here - state['corner'][1]] >= 1
  # A building that is painted far ahead appears when it comes into view.
  status, state = do('paint', cell=[0, here + 3], content='teal')
  assert status == 200 and state['cells'][0][here + 3 - state['corner'][1]] == 6
  _, state = do('step', action=1)
  column = 4 * (here + 3 - state['origin'][1]) + 1
  for name in ('frame', 'true_frame'):
    assert _frame(state, name)[15, column].tolist() == [30, 170, 170]
  status, state = do('counters', values=[999])
  assert status == 200 and state['values'] == state['true_values'] == [999]
  assert do('step', action=1)[1]['read'] == [999]
  # Every step counts, and the model is not told: ledger and frame part.
  _, state = do('switches', events='every_step', counters=False)
  assert state['switches'] == {'events': 'every_step', 'counters': False, 'map': True}
  _, state = do('step', action=1)
  assert state['values'] == [0] and state['read'] == [999] and state['true_values'] == [999]
  _, again = do('restart', seed=5)
  assert {k: again[k] for k in ('frame', 'values', 'cells', 'switches')} == {
      k: opened[k] for k in ('frame', 'values', 'cells', 'switches')}


@pytest.mark.slow
@pytest.mark.parametrize('verb, body, expected', [
    ('step', {'action': 3}, 'Traveler has no action 3: give 0 to 2'),
    ('step', {'action': 'left'}, 'An action is a whole number'), ('step', {}, 'whole number'),
    ('paint', {'cell': [0, 24], 'content': 'red'}, 'outside the world of Traveler'),
    ('paint', {'cell': [0, 3], 'content': 'pink'}, "no 'pink' to paint"),
    ('paint', {'cell': [0, 3], 'content': ['red']}, 'to paint'),
    ('paint', {'cell': 3}, 'its row and its column'),
    ('counters', {'values': [1000]}, 'give score from 0 to 999'),
    ('counters', {'values': [1, 2]}, 'give score from 0 to 999'),
    ('counters', {'values': 7}, 'a list of whole ones'),
    ('switches', {'map': 1}, 'There is no switch'), ('switches', {'events': 'x'}, 'choose one of'),
    ('dance', {}, 'nothing at')])
def test_what_a_game_cannot_do_changes_nothing(server, verb, body, expected):
  _, opened = _ask(server, 'POST', '/games', {'seed': 6})
  status, answer = _ask(server, 'POST', f'/games/{opened["id"]}/{verb}', body)
  assert status in (400, 404) and expected in answer['error']
  status, state = _ask(server, 'POST', f'/games/{opened["id"]}/switches', {})
  assert status == 200 and {**state, 'id': opened['id']} == opened


@pytest.mark.slow
def test_keys_that_are_pressed_too_fast_queue_nowhere(server):
  """1,000 requests as fast as they can be sent: each is a frame, or told to wait."""
  _, opened = _ask(server, 'POST', '/games', {'seed': 7})
  step = lambda _: _ask(server, 'POST', f'/games/{opened["id"]}/step', {'action': 2})[0]
  with ThreadPoolExecutor(24) as pool:
    found = list(pool.map(step, range(1000)))
  assert set(found) <= {200, 429}
  _, state = _ask(server, 'POST', f'/games/{opened["id"]}/switches', {})
  assert state['number'] == found.count(200) > 0


@pytest.mark.slow
def test_a_browser_that_leaves_disturbs_nobody(server, capfd):
  _, opened = _ask(server, 'POST', '/games', {'seed': 8})
  body = b'{"action": 2}'
  for sent in (body[:4], body):
    leaving = socket.create_connection(server.server_address[:2])
    leaving.sendall(f'POST /games/{opened["id"]}/step HTTP/1.1\r\nHost: localhost\r\nContent-Type: '
                    f'application/json\r\nContent-Length: {len(body)}\r\n\r\n'.encode() + sent)
    leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
    leaving.close()
  # The frame of whoever has left may still be in the making.
  deadline, status = time.monotonic() + 60, 429
  while status == 429 and time.monotonic() < deadline:
    time.sleep(0.3)
    status, _ = _ask(server, 'POST', f'/games/{opened["id"]}/step', {'action': 2})
  assert status == 200
  assert 'Traceback' not in capfd.readouterr().err


@pytest.mark.slow
def test_games_are_bounded_and_closed(server):
  opened = [_ask(server, 'POST', '/games', {'seed': n})[1]['id']
            for n in range(rooms.MOST_ROOMS + 3)]
  assert len(server.rooms) == rooms.MOST_ROOMS
  step = lambda name: _ask(server, 'POST', f'/games/{name}/step', {'action': 1})[0]
  assert step(opened[0]) == 404 and step(opened[-1]) == 200
  before = len(server.rooms)
  assert _ask(server, 'POST', f'/games/{opened[-1]}/close', {})[0] == 200
  assert len(server.rooms) == before - 1 and step(opened[-1]) == 404


@pytest.mark.slow
@pytest.mark.parametrize('config', [cfg.Pong(), cfg.PacMan('64x64')], ids=['pong', 'pacman'])
def test_other_games_are_played(config):
  with _served(config) as server:
    _, opened = _ask(server, 'POST', '/games', {'seed': 1})
    for action in range(len(server.facts['actions'])):
      status, state = _ask(server, 'POST', f'/games/{opened["id"]}/step', {'action': action})
      assert status == 200 and state['read'] == state['values'] == state['true_values']
    assert (_frame(state, shape=(*server.facts['frame_shape'], 3))
            == _frame(state, 'true_frame', (*server.facts['frame_shape'], 3))).mean() > 0.9


# --- A browser --------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None or importlib.util.find_spec('playwright') is None,
                    reason='needs Chromium and playwright: make browser')
def test_a_browser_plays(server):
  from playwright.sync_api import sync_playwright
  with sync_playwright() as tools:
    browser = tools.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
    wrong = []
    # The page forbids `eval`, by which this library waits.
    tabs = [browser.new_context(viewport={'width': 390, 'height': 844}, bypass_csp=True).new_page()
            for _ in range(2)]
    before = len(server.rooms)
    for tab in tabs:
      tab.on('pageerror', lambda error: wrong.append(str(error)))
      tab.goto(server.url)
      tab.wait_for_selector('#numbers b')
    assert len(server.rooms) == min(before + 2, rooms.MOST_ROOMS)
    first, second = tabs
    picture = lambda tab: tab.evaluate("document.getElementById('dream').toDataURL()")
    number = lambda tab: tab.evaluate('state.number')
    still, other = picture(first), picture(second)
    for _ in range(3):
      last = number(first)
      first.keyboard.press('ArrowRight')
      first.wait_for_function(f'state.number > {last}')
    assert picture(first) != still and picture(second) == other and number(second) == 0
    first.locator('button[data-action=left]').dispatch_event('pointerdown')
    first.wait_for_function('state.number >= 5')  # It is held.
    first.locator('button[data-action=left]').dispatch_event('pointerup')
    first.locator('[data-content=teal]').click()
    box = first.locator('#map').bounding_box()
    first.mouse.click(box['x'] + box['width'] - 4, box['y'] + box['height'] / 2)
    first.wait_for_function('state.cells[0].at(-1) === 6')
    first.fill('#value0', '37')
    first.click('#apply')
    first.wait_for_function('state.values[0] === 37')
    first.uncheck('#maps')
    first.wait_for_function('state.switches.map === false')
    # Nothing is wider than the screen of a telephone.
    assert first.evaluate('document.documentElement.scrollWidth') <= 390
    second.close(run_before_unload=True)
    first.wait_for_timeout(500)
    assert len(server.rooms) == min(before + 1, rooms.MOST_ROOMS - 1)
    browser.close()
  assert not wrong
