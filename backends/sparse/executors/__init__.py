"""One file for each way to compute a block map; `EXECUTORS` has them, best first."""

from ..executor import Executor, PackageExecutor
from .fa4 import Fa4
from .fastvideo import FastVideo
from .flashinfer import FlashInfer
from .flex import Flex
from .gather import Gather
from .merge import Merge
from .spas_sage import SpasSage

OF_PACKAGES: tuple[PackageExecutor, ...] = (FlashInfer(), FastVideo(), SpasSage(), Fa4())
"""Those of installed packages, which run where they are named."""

EXECUTORS: tuple[Executor, ...] = (Flex(), Gather(), *OF_PACKAGES)

FOR_ONE_METHOD: tuple[Executor, ...] = (Merge(),)
"""Those that only a method takes which names them (`SparseMethod.only_executor`)."""
