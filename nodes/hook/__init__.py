"""ComfyUI's attention hook: a call, its place in the model, a model call, a run, and the patch on a model."""
