"""What Python's callers give by mistake is refused by the parameter's name, before anything is computed."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

import compresskv
import planted
import tiny
from compresskv import PromptError
from compresskv.attention.routing import routing
from compresskv.explain.retention import explain
from compresskv.methods.registry import create
from compresskv.methods.snapkv import SnapKV
from compresskv.models.decoding import prefill
from compresskv.models.load import load

TEXT = " ".join(planted.haystack_sentences(10))
IDS: list[int] = planted.tokenizer()(TEXT)["input_ids"]


def ask(**changes: Any) -> Any:
    given = {"context": "Some text.", "question": "What?", "method": "full", **changes}
    model, tokenizer = given.pop("model", planted.model()), given.pop("tokenizer", planted.tokenizer())
    return compresskv.ask(model, tokenizer, given.pop("context"), given.pop("question"), **given)


def read(**options: Any) -> compresskv.Session:
    return compresskv.read(planted.model(), planted.tokenizer(), TEXT, **{"method": "snapkv", "budget": 20, **options})


def plan() -> compresskv.Plan:
    return compresskv.make_plan(planted.model(), IDS, "snapkv", 20)


class Wrapped(torch.nn.Module):
    """A model within another, which has its config."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def used() -> compresskv.CompressedCache:
    """A cache that has read a prompt."""
    with compresskv.compressing(planted.model(), "snapkv", 20) as cache:
        planted.model()(torch.tensor([IDS]), past_key_values=cache)
    return cache


def test_another_models_tokenizer_is_told_by_its_tokens() -> None:
    model, tokenizer, text = tiny.tiny_model("llama"), tiny.build_tokenizer(), "7 zebra 8"
    tokenizer.add_tokens("zebra")
    calls = (
        lambda: compresskv.ask(model, tokenizer, text, "9", method="snapkv"),
        lambda: compresskv.read(model, tokenizer, text, method="snapkv"),
        lambda: compresskv.read(model, tokenizer, "7 8", method="snapkv").ask(text),
    )
    for call in calls:
        with pytest.raises(PromptError, match=r"^token_ids=128 is no token of this model: its vocabulary has 128$"):
            call()


def test_a_label_is_a_method_with_its_options() -> None:
    named = ask(method="snapkv[window_size=4,kernel_size=1]")
    assert named.stats.method == "snapkv[window_size=4,kernel_size=1]"
    assert named.token_ids == ask(method="snapkv", window_size=4, kernel_size=1).token_ids


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ask(context=None), "context=None must be a text"),
        (lambda: ask(context=b"text"), "context=b'text' must be a text"),
        (lambda: ask(question=3), "question=3 must be a text"),
        (lambda: ask(max_new_tokens="5"), "max_new_tokens='5' must be an int"),
        (lambda: ask(max_new_tokens=True), "max_new_tokens=True must be an int"),
        (lambda: ask(max_new_tokens=1.5), "max_new_tokens=1.5 must be an int"),
        (lambda: ask(truncate="maybe"), "truncate='maybe' is unknown: choose from never, middle"),
        (lambda: ask(model=None), "model=None must be a transformers model, as `load` returns"),
        (lambda: ask(model="smollm2-135m"), "model='smollm2-135m' must be a transformers model, as `load` returns"),
        (lambda: ask(tokenizer=None), "tokenizer=None must be a tokenizer, as `load` returns"),
        (lambda: ask(tokenizer=[1]), "tokenizer='list' must be a tokenizer, as `load` returns"),
        (lambda: ask(decode_interval=0), "decode_interval=0 is of no use without decode_budget=N"),
        (lambda: ask(decode_method="rkw"), "decode_method='rkw' is of no use without decode_budget=N"),
        (lambda: ask(chunk_tokens=9), "chunk_tokens=9 is of no use without chunk_budget=N"),
        (lambda: ask(decode_budget=50, decode_method=3), "decode_method=3 must be a method's name, or a Method"),
        (lambda: compresskv.compressing(None), "model=None must be a transformers model, as `load` returns"),
        (lambda: compresskv.compressing(planted), "model='module' must be a transformers model, as `load` returns"),
        (lambda: load(3), "model=3 must be a name, a folder, a .gguf file or a hub id"),
        (lambda: load(None), "model=None must be a name, a folder, a .gguf file or a hub id"),
        (lambda: load("./nowhere"), "model='./nowhere': no such file or folder"),
        (lambda: load(Path("/no/such")), "model='/no/such': no such file or folder"),
        (lambda: load("./nowhere", device="cudaa"), "device='cudaa' cannot be used on this machine: choose from cpu"),
        (lambda: load("./nowhere", device="mps"), "device='mps' cannot be used on this machine: choose from cpu"),
        (lambda: load("./nowhere", dtype="float"), "model='./nowhere': no such file or folder"),
        (lambda: load("./nowhere", dtype="int3"), "dtype='int3' is no dtype; pass auto"),
        (lambda: load("./nowhere", dtype="float8_e4m3fn"), "dtype='float8_e4m3fn' is no dtype; pass auto"),
        (lambda: ask(two_pass="no"), "two_pass='no' must be True or False"),
        (lambda: ask(method="blend", profile=3), "profile=3 must be the name of a file"),
        (lambda: ask(profile={}), "profile={} must be the name of a file"),
        (
            lambda: compresskv.compressing(planted.model(), exact_prefill="x"),
            "exact_prefill='x' must be True, False or",
        ),
        (lambda: compresskv.make_plan(None, IDS), "model=None must be a transformers model"),
        (lambda: compresskv.make_plan(planted.model(), None), "token_ids must be the integers of one prompt"),
        (lambda: compresskv.make_plan(planted.model(), "text"), "token_ids must be the integers of one prompt"),
        (lambda: compresskv.make_plan(planted.model(), [5, 10**6]), "token_ids=1000000 is no token of this model"),
        (lambda: compresskv.make_plan(planted.model(), [5, -1]), "token_ids=-1 is no token of this model"),
        (lambda: read(name=3), "name=3 must be a text, or None"),
        (lambda: read().save(3), "path=3 must be the name of a file"),
        (lambda: read().save("a\0b"), "path='a\\x00b' must be the name of a file"),
        (lambda: plan().write("a\0b"), "path='a\\x00b' must be the name of a file"),
        (lambda: read().append(TEXT, chunk=-1), "chunk=-1 must be an int of at least 1, or None"),
        (lambda: read().append(TEXT, chunk="a"), "chunk='a' must be an int of at least 1, or None"),
        (lambda: read().append(None), "text=None must be a text"),
        (lambda: compresskv.compressing(Wrapped(planted.model())), "model='Wrapped' must be a transformers model"),
        (lambda: used().adopt(None), "full='NoneType' must be a cache of transformers' own"),
        (lambda: used().adopt(DynamicCache(), 80.0), "num_prompt_tokens=80.0 must be an int of at least 1, or None"),
        (
            lambda: compresskv.open_session(3, planted.model(), planted.tokenizer()),
            "path=3 must be the name of a file",
        ),
        (
            lambda: compresskv.compressing(planted.model(), "snapkv").__exit__(None, None, None),
            "a compressing context is left that was not entered",
        ),
        (lambda: used().crop("x"), "max_length='x' must be an int"),
        (lambda: load("./nowhere", dtype="complex64"), "dtype='complex64' is no dtype; pass auto"),
        (lambda: ask(method=SnapKV), "method='SnapKV' is a class: pass an object, SnapKV(), or a name"),
        (
            lambda: ask(method="snapkv[window_size=8]", kernel_size=3),
            "method='snapkv[window_size=8]' has options already: leave out kernel_size",
        ),
        (lambda: ask(method="snapkv[window_size=8],adakv"), "method='snapkv[window_size=8],adakv' names 2 methods"),
        (lambda: ask(method="snapkv[window=8]"), "method='snapkv[window=8]': window=8 is no option of method 'snapkv'"),
        (lambda: ask(decode_budget=50, decode_method="full"), "decode_method='full' keeps every token"),
        (lambda: compresskv.read_plan(3), "path=3 must be the name of a file"),
        (lambda: plan().write(None), "path=None must be the name of a file"),
        (lambda: compresskv.register("name"), "method='name' must be a class derived from Method, with a name"),
        (lambda: compresskv.register(dict), "method=<class 'dict'> must be a class derived from Method"),
        (lambda: compresskv.make_plan(planted.model(), [True, False]), "token_ids must be the integers of one prompt"),
    ],
)
def test_it_is_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(compresskv.CompressKVError) as caught:
        call()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def kept_by(parameter: str, value: object) -> object:
    if parameter in ("chunk", "max_memory"):
        return read(**{parameter: value})
    return compresskv.compressing(planted.model(), "snapkv", **{parameter: value}).__enter__()


@pytest.mark.parametrize("value", [True, False, 0, 2.0, "2"])
@pytest.mark.parametrize(
    "parameter", ["prompt_tokens", "candidates", "chunk_budget", "decode_budget", "chunk", "max_memory"]
)
def test_counts_are_whole_numbers(parameter: str, value: object) -> None:
    """True would count as one token."""
    with pytest.raises(compresskv.ConfigError, match=rf"={value!r} must be an int of at least 1"):
        kept_by(parameter, value)


@pytest.mark.parametrize("place", ["folder", "new/"])
@pytest.mark.parametrize("write", [lambda path: plan().write(path), lambda path: read().save(path)])
def test_a_folder_is_no_file_to_write(
    write: Callable[[str], None], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(compresskv.CompressKVError, match=f"'{place}': Is a directory"):
        write(place)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_no_more_of_a_value_is_shown_than_its_beginning() -> None:
    with pytest.raises(compresskv.PromptError, match=r"^context=\['word\\nword.*\.\.\. must be a text$") as caught:
        ask(context=["word\nword " * 10_000])
    assert len(str(caught.value)) < 600
    with pytest.raises(compresskv.ConfigError, match=r"^method=Plan\(.*\.\.\. is unknown"):
        ask(method=plan())


def kept_of(context: AbstractContextManager[compresskv.CompressedCache]) -> list[float]:
    """The tokens that each layer keeps of a prompt."""
    with routing(planted.model()), context as cache:
        prefill(planted.model(), torch.tensor([IDS]), cache)
    return [layer.mean_retained for layer in cache.compressed_layers]


TAKERS: dict[str, Callable[[Any], Any]] = {
    "ask": lambda budget: ask(context=TEXT, method="snapkv", budget=budget, max_new_tokens=1).stats.budget,
    "ask twice": lambda budget: ask(context=TEXT, budget=budget, max_new_tokens=1, two_pass=True).stats.budget,
    "read": lambda budget: (
        compresskv.read(planted.model(), planted.tokenizer(), TEXT, method="snapkv", budget=budget).facts.budget
    ),
    "make_plan": lambda budget: compresskv.make_plan(planted.model(), IDS, "snapkv", budget).budget,
    "compressing": lambda budget: kept_of(compresskv.compressing(planted.model(), "snapkv", budget)),
    "CompressedCache": lambda budget: kept_of(
        nullcontext(compresskv.CompressedCache(planted.model(), create("snapkv"), budget))
    ),
    "explain": lambda budget: (
        explain(planted.model(), planted.tokenizer(), torch.tensor([IDS]), create("snapkv"), budget).budget
    ),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_budgets_are_taken_as_they_are_typed_on_the_command_line(taker: str) -> None:
    for text, meant in (("15%", 0.15), ("0.5", 0.5), (" 12 ", 12), ("3MB", "3MB"), ("50% of bytes", "50% of bytes")):
        assert TAKERS[taker](text) == TAKERS[taker](meant)
    for nonsense in ("many", "0%", "3\nXB", "101% of bytes", ""):
        with pytest.raises(compresskv.ConfigError) as caught:
            TAKERS[taker](nonsense)
        assert str(caught.value).startswith(f"budget={nonsense!r} ")
        assert "\n" not in str(caught.value)


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "ask": (compresskv.ask, ask),
    "read": (compresskv.read, read),
    "session.ask": (compresskv.Session.ask, lambda **told: read().ask("What?", **told)),
    "session.say": (compresskv.Session.say, lambda **told: read().say("What?", **told)),
    "session.append": (compresskv.Session.append, lambda **told: read().append("More.", **told)),
    "compressing": (compresskv.compressing, lambda **told: compresskv.compressing(planted.model(), **told)),
    "make_plan": (compresskv.make_plan, lambda **told: compresskv.make_plan(planted.model(), IDS, **told)),
    "load": (load, lambda **told: load("./nowhere", **told)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_to_be_told_must_be_a_function(name: str) -> None:
    function, call = FUNCTIONS[name]
    told = [parameter for parameter in inspect.signature(function).parameters if parameter.startswith("on_")]
    assert told
    for parameter in told:
        with pytest.raises(compresskv.ConfigError, match=rf"^{parameter}=3 must be a function, or None$"):
            call(**{parameter: 3})


@pytest.mark.parametrize(("method", "store"), [("snapkv", "native"), ("adakv", "native"), ("snapkv", "int8")])
@pytest.mark.parametrize(("held", "given"), [(1, 2), (2, 1)])
def test_another_batch_on_a_used_cache_is_refused(method: str, store: str, held: int, given: int) -> None:
    with compresskv.compressing(planted.model(), method, 20, store=store) as cache:
        planted.model()(torch.tensor([IDS] * held), past_key_values=cache)
        with pytest.raises(compresskv.CompressKVError, match=f"^the cache holds a batch of {held}, not of {given}"):
            planted.model()(torch.tensor([IDS[:1]] * given), past_key_values=cache)
        kept = planted.model()(torch.tensor([IDS[:1]] * held), past_key_values=cache)
    assert len(kept.logits) == held


class TestCallbacks:
    @pytest.fixture
    def document(self) -> str:
        return " ".join([*planted.haystack_sentences(10), planted.needle("amber")])

    def test_text_comes_in_whole_words_and_tokens_one_by_one(self, document: str) -> None:
        pieces: list[str] = []
        tokens: list[int] = []
        found = ask(
            context=document, question="What of amber?", max_new_tokens=4, on_text=pieces.append, on_token=tokens.append
        )
        assert "".join(pieces).strip() == found.answer == "amber1 amber2 amber3 amber4"
        assert tokens == found.token_ids
        assert all(piece.endswith(" ") for piece in pieces[:-1])


class Letters:
    """Just enough of a tokenizer: each token is a piece of text, and bytes that make no character are a mark."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, tokens: list[int], **_: Any) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([b"One", b" wo", b"rd", b" more"], ["One ", "word ", "more"]),
        ([b"a\n", b"b", b"\n", b"c d"], ["a\n", "b\n", "c ", "d"]),
        (["\u4e2d".encode(), "\u6587".encode()], ["\u4e2d", "\u6587"]),
        ([b"\xc3", b"\xa9t\xc3", b"\xa9"], ["\u00e9t\u00e9"]),
        ([], []),
    ],
)
def test_a_word_is_told_when_nothing_can_change_it(pieces: list[bytes], told: list[str]) -> None:
    from compresskv.prompts.spoken import Spoken

    heard: list[str] = []
    tokenizer: Any = Letters(*pieces)
    spoken = Spoken(tokenizer, heard.append)
    for token in range(len(pieces)):
        spoken.put(token)
    spoken.end()
    assert heard == told


def test_spaces_at_a_lines_beginning_are_told_where_decoders_drop_a_texts_first() -> None:
    from compresskv.prompts.spoken import Spoken

    words = ["\u2581def", "\u2581f():", "\n", "\u2581\u2581\u2581\u2581return", "\u2581x", "<end>", "\u2581y"]
    built = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="\n"))
    built.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]  # as Llama 2's
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<end>")
    answer = [0, 1, 2, 3, 4, 2, 5, 3, 6, 2, 2, 3]
    heard: list[str] = []
    spoken = Spoken(tokenizer, heard.append)
    for token in answer:
        spoken.put(token)
    spoken.end()
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert text == "def f():\n    return x\n    return y\n\n    return"
    assert "".join(heard) == text
