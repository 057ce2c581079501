from collections.abc import Sequence
from enum import Enum
from typing import Any, ClassVar

from .ui import PreviewImage

class Input:
    id: str
    def __init__(
        self, id: str, display_name: str = ..., optional: bool = ..., tooltip: str = ..., lazy: bool = ...
    ) -> None: ...

class WidgetInput(Input):
    default: Any

class Output:
    def __init__(self, id: str = ..., display_name: str = ..., tooltip: str = ...) -> None: ...

_Input = Input
_Output = Output

class Hidden(str, Enum):
    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"

class HiddenHolder:
    unique_id: str
    prompt: Any
    extra_pnginfo: Any

class Schema:
    __dataclass_fields__: ClassVar[dict[str, Any]]
    inputs: list[Input]
    def __init__(
        self,
        node_id: str,
        display_name: str = ...,
        category: str = ...,
        inputs: Sequence[Input] = ...,
        outputs: Sequence[Output] = ...,
        hidden: Sequence[Hidden] = ...,
        description: str = ...,
        search_aliases: list[str] = ...,
        is_output_node: bool = ...,
        not_idempotent: bool = ...,
        is_deprecated: bool = ...,
    ) -> None: ...

class NodeOutput:
    def __init__(self, *args: Any, ui: PreviewImage | dict[str, Any] = ...) -> None: ...

class ComfyNode:
    hidden: HiddenHolder
    @classmethod
    def define_schema(cls) -> Schema: ...

class Boolean:
    class Input(WidgetInput):
        def __init__(
            self,
            id: str,
            display_name: str = ...,
            optional: bool = ...,
            tooltip: str = ...,
            lazy: bool = ...,
            advanced: bool = ...,
            default: bool = ...,
        ) -> None: ...

class Combo:
    class Input(WidgetInput):
        def __init__(
            self,
            id: str,
            options: list[str] = ...,
            display_name: str = ...,
            optional: bool = ...,
            tooltip: str = ...,
            lazy: bool = ...,
            advanced: bool = ...,
            default: str = ...,
        ) -> None: ...

class Int:
    class Input(WidgetInput):
        def __init__(
            self,
            id: str,
            display_name: str = ...,
            optional: bool = ...,
            tooltip: str = ...,
            lazy: bool = ...,
            advanced: bool = ...,
            default: int = ...,
            min: int = ...,
            max: int = ...,
            step: int = ...,
        ) -> None: ...

class Float:
    class Input(WidgetInput):
        def __init__(
            self,
            id: str,
            display_name: str = ...,
            optional: bool = ...,
            tooltip: str = ...,
            lazy: bool = ...,
            advanced: bool = ...,
            default: float = ...,
            min: float = ...,
            max: float = ...,
            step: float = ...,
        ) -> None: ...

class String:
    class Input(WidgetInput):
        def __init__(
            self,
            id: str,
            display_name: str = ...,
            optional: bool = ...,
            tooltip: str = ...,
            lazy: bool = ...,
            advanced: bool = ...,
            multiline: bool = ...,
            placeholder: str = ...,
            default: str = ...,
            socketless: bool = ...,
            force_input: bool = ...,
        ) -> None: ...

    Output = _Output

class MatchType:
    class Template:
        def __init__(self, template_id: str) -> None: ...

    class Input(_Input):
        def __init__(
            self,
            id: str,
            template: MatchType.Template,
            display_name: str = ...,
            optional: bool = ...,
            tooltip: str = ...,
            lazy: bool = ...,
        ) -> None: ...

    class Output(_Output):
        def __init__(
            self, template: MatchType.Template, id: str = ..., display_name: str = ..., tooltip: str = ...
        ) -> None: ...

class ClipVision:
    Input = _Input

class Conditioning:
    Input = _Input
    Output = _Output

class Guider:
    Input = _Input

class Image:
    Input = _Input
    Output = _Output

class Latent:
    Input = _Input
    Output = _Output

class Model:
    Input = _Input
    Output = _Output

class Noise:
    Input = _Input

class Sampler:
    Input = _Input

class Sigmas:
    Input = _Input

class Vae:
    Input = _Input
