"""What no model can answer, refused before one is loaded."""

from compresskv.errors import PromptError
from compresskv.system.check import check_known

TRUNCATIONS = ("never", "middle")


def check_request(context: str, question: str, truncate: str, *, document_is: str = "context") -> None:
    """Refuse, before a model is loaded, what no model can answer.

    Args:
        document_is: the parameter that the document is given as.
    Raises:
        ConfigError, PromptError: as for `build_prompt`.
    """
    check_known("truncate", truncate, TRUNCATIONS)
    for name, text in (("document", context), ("question", question)):
        if not isinstance(text, str):  # from Python: None, a number, bytes
            raise PromptError("must be a text", option=document_is if name == "document" else name, value=text)
        if not text.strip():
            raise PromptError(f"the {name} is empty")
        if any("\ud800" <= char <= "\udfff" for char in text):  # Python's stand-ins for bytes that are no UTF-8
            raise PromptError(f"the {name} is not valid text: it holds bytes that are not UTF-8")
