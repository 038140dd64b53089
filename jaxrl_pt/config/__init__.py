"""Every setting of a run, as frozen dataclasses that validate themselves.

A run is one `Run` value. Choosing a method is choosing a type: `Run.objective`
is `NextToken()` or `RPT()`, `Algorithm.advantage` is `GRPO()` or `OPO()`, and code
dispatches on it with `match`. This package knows nothing of gin, files or
devices (`gin_bindings` builds these values from `*.gin` files); a bad value
raises `UserError` with what to write instead.

Every public name that a module below defines is `cfg.<name>`, and in gin files too: a new type
is written in its module and nowhere else. No two modules may define one name (a test checks it).
"""

from jaxrl_pt.config.algorithm import *
from jaxrl_pt.config.data import *
from jaxrl_pt.config.model import *
from jaxrl_pt.config.objectives import *
from jaxrl_pt.config.optimizer import *
from jaxrl_pt.config.problems import *
from jaxrl_pt.config.rollouts import *
from jaxrl_pt.config.run import *
from jaxrl_pt.config.verifiers import *
