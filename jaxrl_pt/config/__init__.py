"""Every setting of a run, as frozen dataclasses that validate themselves.

A run is one value of `Run`. A method is chosen by choosing a type: `Run.objective` is
`NextToken()` or `RPT()`, `Algorithm.advantage` is `GRPO()` or `OPO()`, and code dispatches on the
type with `match`. This package knows nothing of gin, files or devices; `gin_bindings` builds its
values from `*.gin` files. A bad value raises `UserError`, which says what to write instead.

Every public name of a module of this package is `cfg.<name>` in code and in gin files, so that a
new type is written in its module and nowhere else. No two modules may define the same name, which
a test checks.
"""

from jaxrl_pt.config.algorithm import *
from jaxrl_pt.config.data import *
from jaxrl_pt.config.environments import *
from jaxrl_pt.config.evaluation import *
from jaxrl_pt.config.examples import *
from jaxrl_pt.config.game import *
from jaxrl_pt.config.game_rl import *
from jaxrl_pt.config.generated import *
from jaxrl_pt.config.hybrid import *
from jaxrl_pt.config.judging import *
from jaxrl_pt.config.maag import *
from jaxrl_pt.config.model import *
from jaxrl_pt.config.objectives import *
from jaxrl_pt.config.optimizer import *
from jaxrl_pt.config.pairs import *
from jaxrl_pt.config.problems import *
from jaxrl_pt.config.reading import *
from jaxrl_pt.config.rollouts import *
from jaxrl_pt.config.run import *
from jaxrl_pt.config.verifiers import *
from jaxrl_pt.config.vision import *
from jaxrl_pt.config.worlds import *
