"""Attention Backends: choose, per model and per role, which kernel computes attention in ComfyUI.

This file is all that ComfyUI loads at start-up. It names the folder of front-end files and offers the V3 entry
point; nodes are imported only when ComfyUI asks for them, so that the library, the command line and the tests
work without ComfyUI.
"""

WEB_DIRECTORY = "web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]  # the return type lives in ComfyUI
    """Return the extension object that ComfyUI asks for; log our own traceback when the nodes cannot load."""
    try:
        from .nodes import Extension
    except Exception:
        # ComfyUI reports only the last line of what an entry point raises.
        import logging

        logging.getLogger("attention_backends").exception("the attention-backends nodes could not be loaded")
        raise
    return Extension()
