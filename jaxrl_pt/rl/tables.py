"""What a choice of `config.Algorithm` computes: for each kind of choice one table by config type.

An entry stands beside its function, in the module of its kind; here the kinds are put together.
The learner looks its functions up in these tables, `jaxrl-pt methods` prints them, and the tests
go through them.
"""

from collections.abc import Mapping

from jaxrl_pt.rl import (
  advantages,
  corrections,
  hgpo,
  mode_choice,
  objectives,
  shaping,
  token_advantages,
)
from jaxrl_pt.rl.entry import Entry

ADVANTAGES: Mapping[type, Entry[advantages.Compute]] = {
    **advantages.TABLE, **token_advantages.TABLE, **hgpo.TABLE, **mode_choice.TABLE}
SURROGATES: Mapping[type, Entry[objectives.SurrogateOf]] = objectives.SURROGATES
AGGREGATIONS: Mapping[type, Entry[objectives.AggregateOf]] = objectives.AGGREGATIONS
CORRECTIONS: Mapping[type, Entry[corrections.Compute]] = corrections.TABLE
SHAPINGS: Mapping[type, Entry[shaping.Compute]] = shaping.TABLE
