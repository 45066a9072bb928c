"""What vLLM looks for in a backend."""

from typing import Any

from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    """Runs nothing."""

    @classmethod
    def is_active(cls) -> bool:
        """Never by itself: Triton would look for machine code to run."""
        return False

    def _never(self, *_arguments: Any) -> Any:
        raise NotImplementedError("kernels are interpreted: set TRITON_INTERPRET=1")

    map_python_to_cpp_type = get_current_target = get_active_torch_device = get_benchmarker = _never
