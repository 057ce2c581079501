"""What dev.py does, in small modules: standard library only, no torch and no ComfyUI in this process.

`inside/` holds the few scripts that other interpreters run (the test environment's, or ComfyUI's own).
"""
