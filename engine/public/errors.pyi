# For type checkers, which do not see that ``import flowreel`` puts the module of these errors under this name.
from flowreel.engine.errors import *  # noqa: F403
