"""The list of what works in docs/models.md: a section for each version of transformers, made by the sweep."""

import re
import textwrap
from pathlib import Path

import transformers

import verbs
from decoders import Outcome

PATH = Path(__file__).parents[2] / "docs" / "models.md"
VERSION = ".".join(transformers.__version__.split(".")[:2])


def updated(page: str, outcomes: dict[str, Outcome], said: dict[str, verbs.Said]) -> str:
    """The page with its section for the installed transformers made anew."""
    section = f"<!-- {VERSION} -->\n{_section(outcomes, said)}<!-- end -->\n"
    pattern = re.compile(rf"<!-- {re.escape(VERSION)} -->\n.*?<!-- end -->\n", re.DOTALL)
    return pattern.sub(lambda _: section, page) if pattern.search(page) else f"{page}\n{section}"


def _section(outcomes: dict[str, Outcome], said: dict[str, verbs.Said]) -> str:
    by_word: dict[str, list[str]] = {word: [] for word in ("works", "refused", "untried")}
    reasons: dict[str, list[str]] = {}
    for model_type, outcome in sorted(outcomes.items()):
        by_word[outcome.word].append(model_type)
        if outcome.word == "refused":
            reasons.setdefault(re.sub(r"\d+", "N", outcome.reason), []).append(model_type)
    parts = [
        f"## With transformers {VERSION}",
        f"{len(by_word['works'])} types work: {_listed(by_word['works'])}",
        _of_verbs({one: said[one] for one in by_word["works"]}),
        f"{len(by_word['refused'])} are refused:",
        *(f"- {reason}: {_listed(types)}" for reason, types in sorted(reasons.items(), key=lambda one: -len(one[1]))),
        f"{len(by_word['untried'])} were not tried, since they read no text without images, need packages that are not "
        f"installed, or could not be made small: {_listed(by_word['untried'])}",
    ]
    return "\n\n".join(map(_wrapped, parts)) + "\n\n"


def _of_verbs(said: dict[str, verbs.Said]) -> str:
    """What `load` and the verbs make of the types that work."""
    unloaded = [one for one, lines in said.items() if "load" in lines]
    ungrouped = [one for one, lines in said.items() if lines.get("profile")]
    but = (
        f", but for those that transformers does not load from what it saved: {_listed(unloaded)}" if unloaded else "."
    )
    return (
        f"`ask`, `explain` and `profile` were run with all of these{but} `profile` refuses {len(ungrouped)} that have "
        f"no grouped-query attention, and need no profile with `snapkv`: {_listed(ungrouped)}"
    )


def _listed(types: list[str]) -> str:
    return ", ".join(f"`{one}`" for one in types) + "."


def _wrapped(text: str) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
