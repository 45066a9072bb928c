"""A prompt's end, read in front of each cut in the middle of the prompt, as `compressing` does: see `cache.end`.

To vLLM these are tokens of the prompt like all others: they are put there when the request comes, and go with the cut.
The tokens behind it have the positions that they would have without.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.request import Request

from compresskv.selection.cuts import num_of_end
from compresskv.serving.settings import EvictionSpec, Settings
from compresskv.serving.versions import check_hooks

check_hooks(Request)


def with_ends(
    request: Any, specs: tuple[EvictionSpec, ...], settings: Settings, longest: int
) -> tuple[EvictionSpec, ...]:
    """The cuts of a request's prompt, those before its end with the prompt's end in front of them if that can be.

    Args:
        longest: vLLM's --max-model-len.
    """
    found, num_added, window_size = list[EvictionSpec](), 0, settings.bare_method().window_size
    for spec in specs:
        num_end = num_of_end(request.num_prompt_tokens - spec.num_read, window_size)
        num_added += num_end
        num_read, num_held = spec.num_read + num_added, spec.num_held + num_end
        found.append(replace(spec, num_read=num_read, num_held=num_held, num_end=num_end))
    return tuple(found) if _has_room(request, num_added, longest) else specs


def _has_room(request: Any, num_added: int, longest: int) -> bool:
    """Whether so many tokens may be put into a prompt: nobody asks about those that it has, and there is room.

    An answer gets as long as was asked for; where that is all that is left of `longest`, at least half of it.
    """
    asks = request.sampling_params.prompt_logprobs is not None or request.num_output_tokens > 0
    left = longest - request.num_prompt_tokens
    wanted = request.max_tokens if request.max_tokens < left else -(-left // 2)
    return not asks and request.prompt_embeds is None and num_added + wanted <= left


def num_put(specs: Sequence[EvictionSpec]) -> int:
    """Tokens that these cuts put into a prompt."""
    return sum(spec.num_end for spec in specs)


def put_ends(request: Any, specs: Sequence[EvictionSpec], longest: int) -> None:
    """Put the prompt's end in front of the cuts. The answer must not grow into what that takes of `longest` tokens."""
    given, start = list(request.prompt_token_ids), 0
    tokens: list[int] = []
    for spec in specs:
        if spec.num_end:
            end = spec.num_read - spec.num_end - len(tokens) + start
            tokens += [*given[start:end], *given[len(given) - spec.num_end :]]
            start = end
    tokens += given[start:]
    request.prompt_token_ids, request.num_prompt_tokens = tokens, len(tokens)
    request._all_token_ids[:] = tokens
    request.block_hashes.clear()
    request.update_block_hashes()
    request.max_tokens = min(request.max_tokens, longest - len(tokens))
