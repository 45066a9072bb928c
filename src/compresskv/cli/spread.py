"""Parameters that several commands share, as fields of one type."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints


def spread(shared: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of a dataclass as parameters, in place of its `given`, which gets them as one."""
    names, hints = [field.name for field in fields(shared)], get_type_hints(shared, include_extras=True)

    def around(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            command(given=shared(**{name: values.pop(name) for name in names}), **values)

        parameters = list[inspect.Parameter]()
        for own in inspect.signature(command).parameters.values():
            given = inspect.signature(shared).parameters.values() if own.name == "given" else [own]
            parameters += [
                one.replace(annotation=hints.get(one.name, one.annotation), kind=inspect.Parameter.KEYWORD_ONLY)
                for one in given
            ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return around
