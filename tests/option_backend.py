"""A backend with an option of every kind, for tests of how options are read and printed."""

from __future__ import annotations

from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import Backend
from attention_backends.backends.values.options import Option


class WithOptions(Backend):
    """Stands in for `sdpa_math`, a name that a configuration accepts."""

    id = "sdpa_math"
    summary = "A backend with options."
    aliases = BACKENDS["sdpa_math"].aliases  # the table of names is made once, perhaps while this one is there
    options = (
        Option("share", float, 0.5, "How much.", minimum=0, maximum=1),
        Option("steps", int, 4, "How many."),
        Option("name", str, "x", "Which."),
        Option("sizes", list, None, "How large."),
        Option("fast", bool, True, "How."),
        Option("more", dict, None, "The rest."),
    )
