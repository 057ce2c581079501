"""Attention Backends: choose, per model and per role, which kernel computes attention in ComfyUI.

This file is all that ComfyUI loads at start-up. It names the folder of front-end files and offers the V3 entry
point; nodes are imported only when ComfyUI asks for them, so that the library, the command line and the tests
work without ComfyUI.
"""

WEB_DIRECTORY = "web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]  # the return type lives in ComfyUI
    """Return the extension object that ComfyUI asks for; log our own traceback when the nodes cannot load.

    On a ComfyUI that is too old, which a line in the log says, it is one without nodes.
    """
    import logging

    log = logging.getLogger("attention_backends")
    oldest = "0.18.0"  # as in pyproject.toml
    found = _comfyui_before(oldest)
    if found is not None:
        from comfy_api.latest import ComfyExtension

        class WithoutNodes(ComfyExtension):
            async def get_node_list(self):  # type: ignore[no-untyped-def]  # so does this one
                return []

        log.error("attention-backends needs ComfyUI %s or newer and found %s, so its nodes are left out: "
                  "update ComfyUI", oldest, found)  # fmt: skip
        return WithoutNodes()
    try:
        from .nodes import Extension
    except Exception:
        # ComfyUI reports only the last line of what an entry point raises.
        log.exception("the attention-backends nodes could not be loaded")
        raise
    return Extension()


def _comfyui_before(oldest: str) -> str | None:
    """The version of the running ComfyUI where it is older than `oldest`; None where it is not, or says none."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return None
    from .backends.values.versions import meets, read

    readable = read(__version__) is not None
    return __version__ if readable and not meets(__version__, f">={oldest}") else None
