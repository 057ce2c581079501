"""Other hosts than ComfyUI: each folder routes the attention calls of that host's models through `backends/`.

Importing this package imports neither torch nor a host.
"""
