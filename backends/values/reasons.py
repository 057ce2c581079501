"""`Reason`: why a machine or a request is refused, as an id with values and as English text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

TEMPLATES: dict[str, str] = {
    "architecture": "architecture {gfx} not in {taken}",
    "batch": "batch {batch} > {max}",
    "causal": "is_causal is not supported",
    "causal.lengths": "is_causal with q_len {q_len} != kv_len {kv_len}",
    "causal.mask": "is_causal together with a mask",
    "dtype": "dtype {dtype} not in {taken}",
    "grouped": "grouped query heads {num_heads}/{num_kv_heads} are not supported",
    "head_dim.in": "head_dim {head_dim} not in {taken}",
    "head_dim.max": "head_dim {head_dim} > {max}",
    "head_dim.min": "head_dim {head_dim} < {min}",
    "head_dim.multiple": "head_dim {head_dim} is not a multiple of {of}",
    "head_dim.multiple.dtype": "head_dim {head_dim} is not a multiple of {of} for {dtype}",
    "head_dim.values": "head_dim of values {values} != {keys}",
    "kv_len.max": "kv_len {kv_len} > {max}",
    "kv_len.min": "kv_len {kv_len} < {min}",
    "mask": "mask kind {mask} not in {taken}",
    "num_heads": "num_heads {num_heads} > {max}",
    "package.missing": "package {package} is not installed",
    "package.needed": "{reason}, which {by} needs",
    "package.unreadable": "package {package} has no readable version: {found}",
    "package.version": "package {package} {found} does not meet {specifier}",
    "scale": "scale {scale} is not head_dim ** -0.5",
    "unavailable": "{why}",
}
"""Id -> text with values in braces. Kernels add theirs with `template`."""


def template(reason_id: str, text: str) -> str:
    """Register the text of an id; returns the id.

    Raises:
        ValueError: the id has another text.
    """
    if TEMPLATES.setdefault(reason_id, text) != text:
        raise ValueError(f"the reason {reason_id} is {TEMPLATES[reason_id]!r}, not {text!r}")
    return reason_id


class Reason(str):
    """An English text with its id and values, for tests and translations.

    A value may be another reason, or a tuple of reasons. `needs`: a requirement that would help, for the support table.
    """

    id: str
    values: Mapping[str, object]

    def __new__(cls, reason_id: str, /, **values: object) -> Reason:
        """Tuples of texts are joined by commas, tuples of reasons by semicolons.

        Raises:
            KeyError: the id has no text.
        """
        words = TEMPLATES[reason_id]
        return _made(words.format(**{name: _shown(value) for name, value in values.items()}), reason_id, values)

    def __reduce__(self) -> tuple[object, ...]:
        return _made, (str(self), self.id, dict(self.values))

    def causes(self) -> Iterator[Reason]:
        """The innermost reasons among its values; itself without any."""
        values = [each for value in self.values.values() for each in (value if isinstance(value, tuple) else (value,))]
        inner = [value for value in values if isinstance(value, Reason)]
        for reason in inner:
            yield from reason.causes()
        if not inner:
            yield self


def _made(text: str, reason_id: str, values: Mapping[str, object]) -> Reason:
    made = str.__new__(Reason, text)
    made.id, made.values = reason_id, values
    return made


def reason_id(reason: str) -> str:
    """The id of a reason; empty for plain text."""
    return reason.id if isinstance(reason, Reason) else ""


def _shown(value: object) -> object:
    if isinstance(value, tuple) and value and all(isinstance(each, Reason) for each in value):
        return "; ".join(value)
    if isinstance(value, tuple) and all(isinstance(each, str) for each in value):
        return f"({', '.join(value)})"
    return value
