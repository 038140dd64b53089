"""Episodes as tokens: what follows a text of the policy, by how that text ended."""

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.data.tokenizer import ByteTokenizer
from jaxrl_pt.environments.interactive import Message
from jaxrl_pt.environments.transcript import make_transcript

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_id


def made(observation_tokens=20, **template):
  settings = cfg.Interactive(cfg.GuessNumber(), max_turns=7, observation_tokens=observation_tokens,
                             template=cfg.ChatTemplate(**template))
  return make_transcript(settings, TOKENIZER)


def text_of(tokens):
  return bytes(t for t in tokens if t < 256).decode()


def test_an_episode_begins_as_a_conversation_does():
  tokens = made().opening([Message('system', 'Be good.'), Message('user', 'Guess.')])
  assert tokens[0] == TOKENIZER.bos_id
  assert text_of(tokens) == 'Be good.\n\nUser: Guess.\n\nAssistant:'
  with pytest.raises(ValueError, match="the role 'pope' is none of system, user, assistant"):
    made().opening([Message('pope', 'hear')])


@pytest.mark.parametrize('drawn, finish, said, follows', [
    (' 50', 'length', ' 50', '\n\nUser: higher\n\nAssistant:'),
    (' 50\n', 'length', ' 50\n', '\nUser: higher\n\nAssistant:'),
    (' 50\n\nUser', 'length', ' 50\n\nUser', ': higher\n\nAssistant:'),
    (' 50\n\nUser:', 'stop_string', ' 50\n', ' higher\n\nAssistant:'),
    (' 50\nUser:', 'stop_string', ' 50', '\n\nUser: higher\n\nAssistant:'),
    ('\n\nUser: higher', 'length', '\n\nUser: higher', '\n\nUser: higher\n\nAssistant:'),
    ('', 'length', '', '\n\nUser: higher\n\nAssistant:')])
def test_what_the_policy_has_drawn_of_the_ending_is_not_written_again(drawn, finish, said, follows):
  transcript, tokens = made(), list(drawn.encode())
  assert transcript.said(tokens, finish) == said
  seen = transcript.answer(tokens, finish, 'higher')
  assert text_of(seen.tokens) == follows and not seen.is_cut
  assert TOKENIZER.bos_id not in seen.tokens


def test_a_text_that_end_of_text_has_ended_is_followed_by_all():
  transcript, tokens = made(), [*b' 50\n', EOS]
  assert transcript.stop == (EOS,) and transcript.stop_strings == ('\nUser:',)
  assert transcript.said(tokens, 'stop') == ' 50\n'
  assert text_of(transcript.answer(tokens, 'stop', 'higher').tokens).startswith('\n\nUser: higher')


def test_a_long_observation_is_cut_between_characters_and_says_so():
  seen = made(observation_tokens=5).answer([65], 'length', 'aéééé')
  assert seen.is_cut and text_of(seen.tokens) == '\n\nUser: aéé [cut]\n\nAssistant:'
  whole = made(observation_tokens=5).answer([65], 'length', 'abcde')
  assert not whole.is_cut and text_of(whole.tokens) == '\n\nUser: abcde\n\nAssistant:'
  split = made(observation_tokens=4).answer([65], 'length', 'aéééé')
  assert text_of(split.tokens) == '\n\nUser: aé [cut]\n\nAssistant:'


def test_invalid_utf8_of_the_policy_is_replaced():
  assert made().said([0xff, 65], 'length') == '\ufffdA'
