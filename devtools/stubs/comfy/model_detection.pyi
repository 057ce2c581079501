from typing import Any

def unet_prefix_from_state_dict(state_dict: dict[str, Any]) -> str: ...
def model_config_from_unet(
    state_dict: dict[str, Any],
    unet_key_prefix: str,
    use_base_if_no_match: bool = ...,
    metadata: dict[str, str] | None = ...,
) -> Any: ...
