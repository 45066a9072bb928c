"""Chat templates of every kind: the model reads document and question, or a line says why it cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import planted
from commands import Result, runner
from compresskv.calibration.needles import NeedleDocument, encode_questions
from compresskv.errors import PromptError
from compresskv.evaluation.encode import encode
from compresskv.evaluation.tasks.example import Example
from compresskv.prompts.offsets import token_range
from compresskv.prompts.prompt import build_prompt
from compresskv.prompts.template import apply_chat_template, encode_message

TEXT = "<begin>{% for m in messages %}[user] {{ m['content'] }} [end]\n{% endfor %}"
PARTS = (
    "<begin>{% for m in messages %}[user] {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %} [end]\n{% endfor %}"
)
STRICT_PARTS = "{% if messages[0]['content'] is string %}{{ raise_exception('parts only') }}{% endif %}" + PARTS
STRIPPING = TEXT.replace("m['content']", "m['content'] | trim")

BAD = {
    "drops it": ("<begin>[user] [end]", "does not write the document and the question as they are"),
    "cuts it": (TEXT.replace("m['content']", "m['content'][:20]"), "does not write the document"),
    "changes it": (TEXT.replace("m['content']", "m['content'] | upper"), "does not write the document"),
    "raises": ("{{ raise_exception('Only system\nmessages!') }}", "it fails (Only system)"),
    "no template": ("{% for %}", "it fails ("),
    "undefined": ("{{ nothing.at.all }}", "it fails ("),
    "wrong type": ("{{ messages + 1 }}", "it fails ("),
    "several": ({"tool_use": TEXT, "rag": TEXT}, "several chat templates (rag, tool_use) and none is the default"),
}
DOCUMENT, QUESTION = "The naïve key is 42 parrots.\nIt rained.", "What is the key?"


def with_template(template: Any) -> PreTrainedTokenizerBase:
    made: Any = planted.bytes_tokenizer()
    made.chat_template = template
    return made  # type: ignore[no-any-return]


def read_by_ask(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(build_prompt(tokenizer, DOCUMENT, QUESTION).input_ids[0].tolist())


def read_by_eval(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    example = Example("needle/single", "1", "", DOCUMENT, f"\n\n{QUESTION}", ("42",), 8)
    return encode(tokenizer, example, None).input_ids


def read_by_profile(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    prefix, (question,) = encode_questions(tokenizer, NeedleDocument("d", DOCUMENT, ()), [(QUESTION, "42 parrots")])
    return prefix + question.suffix


READERS: list[Callable[[PreTrainedTokenizerBase], list[int]]] = [read_by_ask, read_by_eval, read_by_profile]


@pytest.mark.parametrize("read", READERS)
class TestReaders:
    @pytest.mark.parametrize("template", [TEXT, PARTS, STRICT_PARTS, STRIPPING, {"only": TEXT}, {"default": PARTS}])
    def test_all_read_the_same_prompt_whatever_the_template_takes(
        self, read: Callable[[PreTrainedTokenizerBase], list[int]], template: Any
    ) -> None:
        tokenizer = with_template(template)
        expected = f"<begin>[user] {DOCUMENT}\n\n{QUESTION} [end]\n"
        assert read(tokenizer) == tokenizer(expected, add_special_tokens=False)["input_ids"]

    @pytest.mark.parametrize("kind", BAD)
    def test_a_template_that_loses_the_document_or_fails_is_told_in_one_line(
        self, read: Callable[[PreTrainedTokenizerBase], list[int]], kind: str
    ) -> None:
        template, told = BAD[kind]
        with pytest.raises(PromptError) as caught:
            read(with_template(template))
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("lost", "told"), [(DOCUMENT, "document"), (QUESTION, "question")])
    def test_a_tokenizer_that_loses_one_of_them_is_told(
        self, read: Callable[[PreTrainedTokenizerBase], list[int]], lost: str, told: str
    ) -> None:
        backend = Tokenizer(WordLevel({"word": 0}, unk_token="word"))
        backend.normalizer = normalizers.Sequence([normalizers.Replace(line, " ") for line in lost.splitlines()])
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        make: Any = PreTrainedTokenizerFast
        with pytest.raises(PromptError, match=f"leaves nothing of the {told}"):
            read(make(tokenizer_object=backend, unk_token="word"))


class TestCommands:
    @pytest.fixture
    def run(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
        return runner(monkeypatch, capfd, 100)

    @pytest.mark.parametrize("kind", ["drops it", "raises", "several"])
    @pytest.mark.parametrize("command", ["ask", "explain", "eval", "profile"])
    def test_each_ends_in_one_line(self, run: Callable[..., Result], tmp_path: Path, command: str, kind: str) -> None:
        template, told = BAD[kind]
        model = planted.save(tmp_path / "model")
        for file in model.glob("chat_template*"):
            file.unlink()
        config = json.loads((model / "tokenizer_config.json").read_text())
        named = template if isinstance(template, str) else [{"name": n, "template": t} for n, t in template.items()]
        (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
        document, haystack = tmp_path / "doc.txt", planted.write_haystack(tmp_path / "hay.txt")
        document.write_text(" ".join(planted.haystack_sentences(10)))
        arguments: dict[str, list[str | Path]] = {
            "ask": [document, "What of amber?", "--model", model, "--method", "snapkv"],
            "explain": [document, "What of amber?", "--model", model, "--method", "snapkv", "--html", tmp_path / "x"],
            "eval": ["--model", model, "--methods", "snapkv", "--haystack", haystack, "-o", tmp_path / "run"],
            "profile": [model, "--haystack", haystack, "--quick", "--lengths", "256", "-o", tmp_path / "profile.json"],
        }
        result = run(command, *arguments[command])
        assert result.code == 2
        assert told in result.err
        assert len(result.err.splitlines()) == 1
        assert not {"x", "run", "profile.json"} & {path.name for path in tmp_path.iterdir()}


class TestPlace:
    @pytest.mark.parametrize("content", ["[user] [user]", "user", "end\n\n[end]", "  white  ", "\x1a [user] \x1a"])
    @pytest.mark.parametrize("template", [TEXT, PARTS, STRIPPING])
    def test_the_content_is_found_where_it_stands_though_the_template_says_the_same(
        self, template: str, content: str
    ) -> None:
        text, start = apply_chat_template(with_template(template), content)
        place = len("<begin>[user] ")
        assert text[place:].startswith(content.strip() if template is STRIPPING else content)
        assert start == place - (content.index(content.strip()) if template is STRIPPING else 0)

    def test_a_tokenizer_that_ends_texts_with_a_special_token_leaves_spans_where_they_are(self) -> None:
        from tokenizers.processors import TemplateProcessing

        tokenizer: Any = planted.bytes_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<begin> $A <end>", special_tokens=[("<begin>", 0), ("<end>", 1)]
        )
        message = encode_message(tokenizer, "one two three")
        assert tokenizer.decode(message.input_ids[message.tokens_of(4, 7)]).strip() == "two"


@pytest.mark.parametrize(
    ("offsets", "start", "end", "expected"),
    [
        ([(0, 3), (3, 7), (7, 9)], 3, 7, slice(1, 2)),
        ([(0, 3), (3, 7), (7, 9)], 2, 8, slice(0, 3)),
        ([(0, 0), (0, 3), (3, 7), (0, 0)], 3, 7, slice(2, 3)),  # special tokens around
        ([(0, 0), (0, 3), (4, 7), (0, 0)], 3, 4, slice(2, 2)),  # what no token holds
        ([(0, 3), (3, 7)], 7, 7, slice(2, 2)),
        ([(0, 2), (0, 2), (2, 3)], 0, 1, slice(0, 2)),  # one character of two tokens
    ],
)
def test_ranges(offsets: list[tuple[int, int]], start: int, end: int, expected: slice) -> None:
    assert token_range(offsets, start, end) == expected
