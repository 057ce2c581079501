"""Routing of attention calls to kernels: what can run, what should run, and what did run.

Nothing in this package imports ComfyUI, and importing it imports neither torch nor any kernel package.
Start reading at `request.py` (what a call is), then `backend.py`, `router.py` and `session.py`.
"""
