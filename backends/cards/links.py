"""Bandwidths of links between cards, as published: for estimates before anything is measured, and for the docs.

A run never uses them: it measures its links (`transport.py`). No number here was measured by this project.
"""

from __future__ import annotations

from typing import NamedTuple

from .cost import Link, Points

PCI_SIG = "PCI Express Base Specification, line rate x lanes x 128/130"
LATENCY = 20e-6
"""Seconds assumed for a copy of few bytes."""


class Published(NamedTuple):
    """A link in one direction."""

    bytes_per_second: float
    source: str


def _pcie(gigatransfers: float, lanes: int) -> Published:
    return Published(gigatransfers * 1e9 * lanes * 128 / 130 / 8, PCI_SIG)


LINKS: dict[str, Published] = {
    "PCIe 3.0 x4": _pcie(8, 4),
    "PCIe 3.0 x8": _pcie(8, 8),
    "PCIe 3.0 x16": _pcie(8, 16),
    "PCIe 4.0 x4": _pcie(16, 4),
    "PCIe 4.0 x8": _pcie(16, 8),
    "PCIe 4.0 x16": _pcie(16, 16),
    "PCIe 5.0 x8": _pcie(32, 8),
    "PCIe 5.0 x16": _pcie(32, 16),
    "NVLink bridge of RTX 3090": Published(56.25e9, "NVIDIA Ampere GA102 Architecture whitepaper: 4 x 14.0625 GB/s"),
    "NVLink 3 (A100)": Published(300e9, "NVIDIA A100 Architecture whitepaper: 12 x 25 GB/s"),
    "NVLink 4 (H100)": Published(450e9, "NVIDIA H100 Architecture whitepaper: 18 x 25 GB/s"),
}
"""Name -> bytes per second in one direction. Copies through the host use the links of both cards and reach less."""


def link_of(name: str) -> Link:
    """The link with this name, at its published bandwidth, as if it had been measured."""
    rate = LINKS[name].bytes_per_second
    points = Points([(size, LATENCY + size / rate) for size in (0.0, 1e9)])
    return Link(points, points)
