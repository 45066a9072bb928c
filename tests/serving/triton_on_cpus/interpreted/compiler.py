"""What Triton looks for in a backend."""

from typing import Any

from triton.backends.compiler import BaseBackend


class InterpretedBackend(BaseBackend):
    """Compiles nothing."""

    def _never(self, *_arguments: Any) -> Any:
        raise NotImplementedError("kernels are interpreted: set TRITON_INTERPRET=1")

    supports_target = hash = parse_options = add_stages = load_dialects = get_module_map = _never
