"""What a server evicts: one budget and one method for all requests, and how one request may ask for another budget."""

import functools
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from compresskv import defaults
from compresskv.errors import ConfigError
from compresskv.methods.base import Method
from compresskv.methods.registry import create, methods, parse_method
from compresskv.selection.budget_words import IN_TOKENS
from compresskv.selection.budgets import in_tokens, known_beforehand, read_budget
from compresskv.selection.cuts import (
    CHUNK_TOKENS,
    DECODE_INTERVAL,
    END_TOKENS,
    Chunks,
    Cut,
    DecodeBudget,
    least_end,
    prompt_cuts,
)
from compresskv.serving.switch import KEY, VARIABLES, given_settings

_COUNTS = ("chunk_budget", "chunk_tokens", "decode_budget", "decode_interval")
_LARGEST = 2**63 - 1  # that vLLM can send between its processes


@dataclass(frozen=True)
class EvictionSpec(Cut):
    """One cut of one request. The scheduler decides it when the request comes; workers are told."""

    window_size: int
    """The observation window: so many of the last tokens before the cut, of a prompt in one step."""
    generated: bool = False
    """Whether it cuts what was generated, whose queries come one by one."""
    num_end: int = 0
    """Tokens of the prompt's end that were read in front of it, the last of those held: none of them is kept."""

    @property
    def num_candidates(self) -> int:
        """Tokens that it chooses among."""
        return self.num_held - self.num_end

    @property
    def last_chunk(self) -> int:
        """Tokens that the step which ends with the cut reads at least: the window, and never one alone.

        A step of one token a request is a decode step to vLLM, which may replay it as one CUDA graph, where no query
        can be seen.
        """
        return 1 if self.generated else min(least_end(self.window_size), self.num_held)


@dataclass(frozen=True)
class PlannedEviction:
    """What workers do with a request when a step has read it up to a cut."""

    spec: EvictionSpec
    targets: list[int]
    """The blocks that the retained tokens move to."""
    num_observed: int
    """How many of the observation window's tokens this step reads; earlier steps have read the others."""


@dataclass(frozen=True)
class Settings:
    """What is evicted. Hashable; travels between vLLM's processes as `to_dict`."""

    budget: int | float
    method: str = defaults.SERVED_METHOD
    """The method's label: its name and the options that differ from its defaults."""
    profile: str | None = None
    """A profile file; None finds the model's own."""
    chunk_budget: int | None = None
    """Tokens of a prompt that stay from chunk to chunk; None: prompts are cut at their end alone."""
    chunk_tokens: int = CHUNK_TOKENS
    """Tokens of a chunk."""
    decode_budget: int | None = None
    """Tokens that stay, the prompt's among them, when what was generated is cut, too; None: it is kept."""
    decode_interval: int = DECODE_INTERVAL
    """New tokens between two such cuts."""
    decode_method: str = defaults.SERVED_DECODE_METHOD
    """The label of the method of these."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a budget out of range, or a method that cannot serve.
        """
        in_tokens(self.budget)
        check_servable(_method(self.method))
        if self.chunks is not None:
            self.chunks.check(self.bare_method().window_size, self.budget)
        if self.decode is not None:
            method = _method(self.decode_method, "decode_method")
            check_servable(method)
            self.decode.check(method.window_size)

    @property
    def chunks(self) -> Chunks | None:
        """How prompts are cut while they are read."""
        return None if self.chunk_budget is None else Chunks(self.chunk_budget, self.chunk_tokens)

    @property
    def decode(self) -> DecodeBudget | None:
        """How what is generated is cut."""
        return None if self.decode_budget is None else DecodeBudget(self.decode_budget, self.decode_interval)

    def generated_spec(self, num_prompt: int, num_held: int, num_read: int) -> EvictionSpec:
        """The first cut of what was generated behind `num_read` tokens, where there is a decode budget.

        Args:
            num_held: of the prompt, once it was read and cut.
        """
        assert self.decode is not None
        cut = self.decode.next_cut(num_prompt, num_held, num_read)
        window_size = self.bare_decode_method().window_at(cut.num_kept)
        return EvictionSpec(**asdict(cut), window_size=window_size, generated=True)

    def bare_decode_method(self) -> Method:
        """The method that cuts what was generated, without a profile yet."""
        return _method(self.decode_method, "decode_method")

    def bare_method(self) -> Method:
        """The method, without a profile yet."""
        return _method(self.method)

    def eviction_specs(self, num_prompt: int, extra_args: Mapping[str, Any] | None) -> tuple[EvictionSpec, ...]:
        """How a prompt of `num_prompt` tokens is cut; none where it is kept whole.

        Args:
            extra_args: the request's own, see `requested_budget`.
        Raises:
            ConfigError: a budget that cannot work.
        """
        budget, method = requested_budget(extra_args, self.budget), self.bare_method()
        if budget is None:
            return ()
        num_kept = method.resolve_budgets(budget, 1, num_prompt)[0][0]
        cuts = prompt_cuts(num_prompt, num_kept, method.window_size, self.chunks)
        windows = [min(method.window_at(cut.num_kept), cut.num_held) for cut in cuts]
        return tuple(EvictionSpec(**asdict(cut), window_size=size) for cut, size in zip(cuts, windows, strict=True))

    def most_tokens(self, longest: int) -> tuple[int, int]:
        """What a prompt of at most `longest` tokens holds at once, and what its cuts retain of that, at most."""
        method = self.bare_method()
        kept = method.resolve_budgets(self.budget, 1, longest)[0][0]
        if self.chunks is None:
            return longest, kept
        kept = max(kept, self.chunks.budget)
        behind = max(END_TOKENS, method.window_size)
        return min(longest, kept + self.chunks.tokens + behind), kept

    def to_dict(self) -> dict[str, Any]:
        """For vLLM's `additional_config`."""
        return asdict(self)


def find_settings(additional: Any, environ: Mapping[str, str] = os.environ) -> Settings | None:
    """The settings in vLLM's `additional_config`, and where that has none, in the environment; None: switched off.

    Args:
        additional: {"compresskv": {"budget": ..., "method": ..., "profile": ..., "chunk_budget": ...,
            OPTION_OF_THE_METHOD: ...}}, or {"compresskv": false}, which switches off whatever the environment says.
    Raises:
        ConfigError: a value that cannot work, with the option's name.
    """
    given = given_settings(additional, environ)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(f"additional_config: {KEY}={given!r} is not an object such as {{'budget': 256}}")
    if "budget" not in given:
        raise ConfigError(f"{KEY}: {dict(given)} has no budget: give one, such as 256 or '3%'")
    options = {name: value for name, value in given.items() if name not in VARIABLES}
    profile = given.get("profile")
    numbers: dict[str, Any] = {name: _count(name, given[name]) for name in _COUNTS if given.get(name) is not None}
    if decode_method := given.get("decode_method"):
        numbers["decode_method"] = _method(str(decode_method), "decode_method").label
    return Settings(
        _budget(given["budget"]), _label(given.get("method"), options), str(profile) if profile else None, **numbers
    )


def plugins_with_ours(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variable with vLLM's list of plugins to load, ours among them; nothing where it loads all of them."""
    plugins = environ.get("VLLM_PLUGINS")
    if plugins is None or KEY in plugins.split(","):
        return {}
    return {"VLLM_PLUGINS": ",".join(filter(None, (plugins, KEY)))}


def requested_budget(extra_args: Mapping[str, Any] | None, default: int | float) -> int | float | None:
    """The budget of one request; None keeps its whole prompt.

    Args:
        extra_args: {"compresskv": 128}, "3%", "off", false, or {"budget": one of these}.
        default: for requests that say nothing.
    Raises:
        ConfigError: none of these.
    """
    given = None if extra_args is None else extra_args.get(KEY)
    if given is None:
        return default
    if isinstance(given, Mapping):
        if set(given) != {"budget"}:
            raise ConfigError(f"{KEY}={dict(given)!r}: a request may give its budget and nothing else")
        given = given["budget"]
    if given is False or (isinstance(given, str) and given.strip().lower() == "off"):
        return None
    return _budget(given)


def check_servable(method: Method) -> None:
    """Refuse methods whose choice does not fit one block table for all layers.

    Raises:
        ConfigError: naming the methods that do.
    """
    if not method.shares_positions:
        fit = ", ".join(repr(name) for name, kind in methods().items() if kind.shares_positions)
        raise ConfigError(
            f"method {method.name!r} keeps other tokens in every layer, but vLLM has one block table for all: use {fit}"
        )
    if method.lookahead:
        raise ConfigError(f"lookahead={method.lookahead}: inside vLLM a prompt is cut at the end of its prefill")


def _budget(given: Any) -> int | float:
    budget = known_beforehand(read_budget(given, IN_TOKENS))
    if not isinstance(budget, (int, float)):
        raise ConfigError(
            f"budget={given!r}: vLLM has one block table for all layers, so give one number of tokens, or a share"
        )
    if budget > _LARGEST:
        raise ConfigError(f"budget={budget} is more than vLLM can pass on: give at most {_LARGEST}, or 'off'")
    return budget


def _count(name: str, given: Any) -> int:
    """A number of tokens, which the environment has as text."""
    if isinstance(given, str) and given.strip().isdecimal():
        return int(given)
    if isinstance(given, bool) or not isinstance(given, int):
        raise ConfigError("must be a number of tokens", option=name, value=given)
    return given


def _label(method: Any, options: Mapping[str, Any]) -> str:
    """The label of a method that was named, with its options beside it or in its label."""
    name = defaults.SERVED_METHOD if method is None else str(method)
    if not options:
        return _method(name).label
    if "[" in name:
        raise ConfigError(f"method {name!r} has options already: leave out {', '.join(map(repr, options))}")
    return create(name, **options).label


@functools.cache
def _method(label: str, option: str = "method") -> Method:
    return parse_method(option, label)
