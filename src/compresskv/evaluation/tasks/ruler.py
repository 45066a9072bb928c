"""RULER's variable tracking (Hsieh et al., arXiv 2404.06654): a chain of assignments hidden in noise."""

import random
import string
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from compresskv.errors import ConfigError
from compresskv.evaluation.example import Example
from compresskv.evaluation.metrics import contains
from compresskv.evaluation.task import Task, TaskSettings, register_task
from compresskv.prompts.template import encode_message

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_TEXT = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assigned the value {value}, they are:"
)
_NUM_HOPS = 4
_SHOT_NOISE = 5  # lines of noise in the solved example that precedes the question
_MAX_NEW_TOKENS = 30


@dataclass(frozen=True)
class _Chain:
    """Variables that all have one value: the first is given it, each other is given the one before."""

    names: tuple[str, ...]
    value: int

    @classmethod
    def drawn(cls, draw: random.Random, num_letters: int) -> "_Chain":
        names: list[str] = []
        while len(names) <= _NUM_HOPS:
            name = "".join(draw.choices(string.ascii_uppercase, k=num_letters))
            names += [name] if name not in names else []
        return cls(tuple(names), draw.randrange(10000, 99999))

    @property
    def lines(self) -> list[str]:
        given = [str(self.value), *(f"VAR {name}" for name in self.names)]
        return [f"VAR {name} = {what}" for name, what in zip(self.names, given, strict=False)]

    @property
    def question(self) -> str:
        return _QUESTION.format(value=self.value, count=len(self.names))

    def hidden(self, draw: random.Random, num_noise: int) -> str:
        """Its lines, in order, at random places among `num_noise` lines of noise."""
        lines = self.lines
        places = set(draw.sample(range(num_noise + len(lines)), len(lines)))
        rest = iter(lines)
        return "\n".join(next(rest) if place in places else _NOISE for place in range(num_noise + len(lines)))


@register_task
class RulerTask(Task):
    """Variable tracking: everything that a variable was assigned through other variables.

    One chain of four hops in repeated sentences, after one solved example. Differs from RULER: the whole prompt, the
    beginning of the answer included, is the user's text where the model has a chat template.
    """

    name = "ruler"
    summary = "RULER's variable tracking: a chain of assignments hidden in noise"
    default_subsets = ("variable_tracking",)
    metrics: ClassVar[dict[str, str]] = {"score": "share of the variables named in the prediction"}

    def examples(self, settings: TaskSettings) -> list[Example]:
        """For each length `limit` cases, or one.

        Raises:
            ConfigError: an unknown subset, or a length too short for the chain.
        """
        numbers = range(settings.limit or 1)
        return [
            _example(settings.tokenizer, settings.seed, subset, length, number)
            for subset in self.chosen_subsets(settings)
            for length in dict.fromkeys(settings.lengths)
            for number in numbers
        ]

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """The share of the chain's variables that the prediction names."""
        found = [contains(prediction, name) for name in example.answers]
        return {"score": sum(found) / len(found)}


def _example(tokenizer: PreTrainedTokenizerBase, seed: int, subset: str, length: int, number: int) -> Example:
    draw = random.Random(repr((seed, subset, length, number)))
    shot = _Chain.drawn(draw, num_letters=3)
    solved = f"{_TEXT}{shot.hidden(draw, _SHOT_NOISE)}{shot.question} {' '.join(shot.names)}\n\n\n"
    chain = _Chain.drawn(draw, num_letters=5)
    prefix = solved + _TEXT

    def num_tokens(num_noise: int) -> int:
        text = "\n".join([*chain.lines, *[_NOISE] * num_noise])
        return len(encode_message(tokenizer, prefix + text + chain.question).input_ids) + _MAX_NEW_TOKENS

    base = num_tokens(0)
    each = max(1, num_tokens(1) - base)
    num_noise = (length - base) // each
    while num_noise > 0 and num_tokens(num_noise) > length:  # lines next to each other may merge into other tokens
        num_noise -= 1
    if num_noise < 1:
        problem = f"leaves no room for text beside what {subset} hides in it"
        raise ConfigError(problem, option="lengths", value=length)
    context = chain.hidden(draw, num_noise)
    starts = [len(prefix) + context.index(line) for line in chain.lines]
    return Example(
        task=f"{RulerTask.name}/{subset}",
        id=f"{length}-{number}",
        prefix=prefix,
        context=context,
        suffix=chain.question,
        answers=chain.names,
        max_new_tokens=_MAX_NEW_TOKENS,
        evidence=tuple((start, start + len(line)) for start, line in zip(starts, chain.lines, strict=True)),
        meta={"length": length},
    )
