"""Cuts beside the one at a prompt's end, as they are asked for: while it is read, and while an answer is generated."""

from dataclasses import dataclass

from compresskv import defaults
from compresskv.cache.auto import check_known_early
from compresskv.cache.generated import check_decoding
from compresskv.errors import ConfigError
from compresskv.methods.base import Method
from compresskv.methods.registry import create, parse_method
from compresskv.selection.budgets import Budget
from compresskv.selection.cuts import CHUNK_TOKENS, DECODE_INTERVAL, Chunks, DecodeBudget


@dataclass(frozen=True)
class CutOptions:
    """What is asked for; see `compressing`."""

    chunk_budget: int | None = None
    chunk_tokens: int = CHUNK_TOKENS
    decode_budget: int | None = None
    decode_interval: int = DECODE_INTERVAL
    decode_method: str | Method | None = None

    @property
    def needs_profile(self) -> bool:
        """Whether the method that cuts what is generated looks into a profile; the default does, where there is one."""
        if self.decode_budget is None:
            return False
        return self.decode_method is None or find_decode_method(self.decode_method).needs_profile


def find_cuts(
    method: Method, budget: Budget, asked: CutOptions, *, reads_twice: bool = False
) -> tuple[Chunks | None, tuple[DecodeBudget, Method] | None]:
    """What is cut and by which method, as far as that can be told without the model.

    Args:
        method, budget: those of the cut at the prompt's end.
        reads_twice: the prompt is read once to plan, once to keep.
    Raises:
        ConfigError: numbers that cannot work, methods that cannot cut, or an option without the budget that it needs.
    """
    if asked.chunk_budget is None:
        _check_default("chunk_budget", asked, "chunk_tokens")
    elif reads_twice:
        problem = "cuts a prompt while it is read, and this one is read twice: leave it out"
        raise ConfigError(problem, option="chunk_budget", value=asked.chunk_budget)
    chunks = _find_chunks(method, budget, asked.chunk_budget, asked.chunk_tokens)
    if asked.decode_budget is None:
        _check_default("decode_budget", asked, "decode_interval", "decode_method")
        return chunks, None
    chosen, decode = find_decode_method(asked.decode_method), DecodeBudget(asked.decode_budget, asked.decode_interval)
    check_decoding(chosen, method, decode)
    return chunks, (decode, chosen)


def find_decode_method(named: str | Method | None) -> Method:
    """The method that cuts what is generated, without a profile yet; of the defaults, the one that needs none.

    Raises:
        ConfigError: no such method, or several.
    """
    if isinstance(named, Method):
        return named
    if named is None:
        return create(defaults.DECODE_METHODS[-1])
    if not isinstance(named, str):
        raise ConfigError("must be a method's name, or a Method", option="decode_method", value=named)
    return parse_method("decode_method", named)


def _find_chunks(method: Method, budget: Budget, between: int | None, tokens: int) -> Chunks | None:
    """How prompts are cut while they are read; None: at their end alone.

    Raises:
        ConfigError: numbers that cannot work, or a method that keeps all of a prompt, or must see it at once.
    """
    if between is None:
        return None
    if not (method.cuts_again and method.evicts):
        if method.lookahead:
            why = "looks ahead: leave out lookahead"
        else:
            why = f"{'must see' if method.evicts else 'keeps'} all of it: use another method"
        problem = f"cuts a prompt while it is read, but method {method.label!r} {why}"
        raise ConfigError(problem, option="chunk_budget", value=between)
    check_known_early(budget)
    chunks = Chunks(between, tokens)
    chunks.check(method.window_size, budget)
    return chunks


def _check_default(budget: str, asked: CutOptions, *options: str) -> None:
    """Refuse what would be ignored, since the budget that it goes with is not given."""
    for option in options:
        if (value := getattr(asked, option)) != getattr(CutOptions, option):
            raise ConfigError(f"is of no use without {budget}=N", option=option, value=value)
