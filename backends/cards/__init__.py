"""One attention call over several local cards in one process: some heads are computed on another card and brought back.

Heads are independent, so the result is that of each card's kernel and nothing is merged. `heads.py` registers with a
session, `divided.py` runs a call, `card.py` is another card with its session, `transport.py` moves tensors,
`estimate.py` and `cost.py` decide from measured times whether dividing pays. Nothing is divided where it does not.
"""
