"""One file for each way to compute a block map; `EXECUTORS` has them, best first."""

from ..executor import Executor
from .flex import Flex
from .gather import Gather
from .merge import Merge

EXECUTORS: tuple[Executor, ...] = (Flex(), Gather())

FOR_ONE_METHOD: tuple[Executor, ...] = (Merge(),)
"""Those that only a method takes which names them (`SparseMethod.only_executor`)."""
