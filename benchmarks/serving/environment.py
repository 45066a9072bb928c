"""The environment of the servers that are compared."""

from collections.abc import Mapping

from compresskv.serving.settings import plugins_with_ours
from compresskv.serving.switch import VARIABLES


def server_environment(environ: Mapping[str, str], *, compressed: bool) -> dict[str, str]:
    """A server's environment. What settings are exported there belongs to other servers than those compared here."""
    left_out = {*VARIABLES.values(), "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment = {name: value for name, value in environ.items() if name not in left_out}
    environment |= {"VLLM_LOGGING_LEVEL": "ERROR"} | plugins_with_ours(environ)
    return environment | {VARIABLES["budget"]: "1.0"} if compressed else environment
