"""One file for each way to compute a block map; `EXECUTORS` has them, best first."""

from ..executor import Executor
from .flex import Flex
from .gather import Gather

EXECUTORS: tuple[Executor, ...] = (Flex(), Gather())
