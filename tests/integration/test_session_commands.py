"""Documents that are read once, saved, shown, asked and talked about on the command line."""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

import planted
from commands import Result, runner
from compresskv import ModelError, defaults

QUESTION = "What of amber?"
ANSWER = "amber1 amber2 amber3 amber4 amber5 amber6"
OTHER = "birch1 birch2 birch3 birch4 birch5 birch6"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and documents."""
    folder = tmp_path_factory.mktemp("place")
    planted.save(folder / "model")
    sentences = planted.haystack_sentences(40)
    sentences[10:10], sentences[30:30] = [planted.needle("amber")], [planted.needle("birch")]
    (folder / "doc.txt").write_text(" ".join(sentences), encoding="utf-8")
    (folder / "other.txt").write_text(" ".join(sentences[5:]), encoding="utf-8")
    return folder


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COMPRESSKV_CACHE", str(place / "cache"))
    return runner(monkeypatch, capfd, columns=100)


@pytest.fixture
def kept(place: Path, call: Callable[..., Result]) -> Path:
    if not (place / "doc.kvc").exists():
        assert call("read", "doc.txt", "--model", "model", "--method", "full").code == 0
    return place / "doc.kvc"


def refused(result: Result, *words: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err


@pytest.mark.parametrize("budget", [(), ("--budget", "12.5% of bytes"), ("--budget", "200 kB")], ids=str)
def test_by_default_few_bits_hold_a_document(budget: tuple[str, ...], call: Callable[..., Result]) -> None:
    result = call("read", "doc.txt", "--model", "model", *budget, "--output", "by-default.kvc")
    assert result.code == 0
    assert "kvzip" in result.err  # the model has no profile
    assert "in int8" in result.err
    shown = call("session", "show", "by-default.kvc", "--json")
    facts = json.loads(shown.out)
    assert (facts["method"], facts["store"]) == ("kvzip", "int8")
    assert facts["kv_nbytes"] < 0.3 * facts["kv_nbytes_full"]


def test_one_token_is_noted_where_all_may_have_been_meant(
    call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, note = ["--model", "model", "--method", "snapkv"], "--budget 1 is one token: all of the prompt is 1.0"
    assert f"[{note}" in call("read", "doc.txt", "-o", "one.kvc", "--budget", "1", *base).err
    told = json.loads(call("read", "doc.txt", "-o", "one.kvc", "--budget", "1", *base, "--json").out)
    assert note.replace("--budget ", "budget=") in told[0]["notes"][0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    assert f"[{note}" in call("chat", "one.kvc").err
    assert "one token" not in call("read", "doc.txt", "-o", "two.kvc", "--budget", "2", *base).err


def test_a_document_is_read_and_asked_twice(kept: Path, call: Callable[..., Result]) -> None:
    for question, answer in ((QUESTION, ANSWER), ("What of birch?", OTHER), (QUESTION, ANSWER)):
        result = call("ask", "doc.kvc", question)
        assert (result.code, result.out.strip()) == (0, answer)
        assert "first token after" in result.err
    told = json.loads(call("ask", "doc.kvc", QUESTION, "--json", "--model", "model").out)
    assert told["answer"] == ANSWER
    assert told["model"] == "model"


def test_a_model_that_is_named_is_taken_though_it_is_the_default(
    kept: Path, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def note(spec: str, **_: object) -> None:
        loaded.append(spec)
        raise ModelError("noted")

    monkeypatch.setattr("compresskv.models.load.load", note)
    call("ask", "doc.kvc", QUESTION)
    call("ask", "doc.kvc", QUESTION, "--model", defaults.MODEL)
    assert loaded == ["model", defaults.MODEL]


def test_show_tells_what_a_file_holds(kept: Path, call: Callable[..., Result]) -> None:
    shown = call("session", "show", "doc.kvc")
    assert shown.code == 0
    for word in ("doc.txt", "model (llama-", "float32", "full", "just now", "(100.0%)"):
        assert word in shown.out
    told = json.loads(call("session", "show", "doc.kvc", "--json").out)
    assert (told["names"], told["turns"]) == (["doc.txt"], [])
    assert told["file_nbytes"] == kept.stat().st_size
    assert told["kv_nbytes"] < told["file_nbytes"] < 1.05 * told["kv_nbytes"]


def test_explain_shows_what_was_kept_of_a_document(place: Path, call: Callable[..., Result]) -> None:
    options = ["--model", "model", "--method", "kvzip", "--budget", "25%"]
    assert call("read", "doc.txt", "-o", "quarter.kvc", *options).code == 0
    needle = planted.needle("amber")
    result = call("explain", "quarter.kvc", QUESTION, "--json", "--evidence", needle, "--evidence", "nowhere")
    assert result.code == 0
    assert "some of the evidence does not occur in the document" in result.err
    told = json.loads(result.out)
    texts, (kept,) = told["prompt"]["texts"], told["methods"]
    start, end = told["prompt"]["document"]
    words = (place / "doc.txt").read_text(encoding="utf-8").replace(".", " .").split()
    assert "".join(texts[start:end]).split()[: len(words)] == words
    ((start, end),) = told["prompt"]["evidence"]
    assert "".join(texts[start:end]).replace(" ", "") == needle.replace(" ", "")
    assert kept["answer"] == ANSWER
    assert kept["retained_fraction"] == pytest.approx(0.25, abs=0.02)
    attended = kept["attended"]
    assert len(attended) == len(texts)
    assert 0.5 < sum(attended) <= 1
    before, after = told["prompt"]["document"]
    mean = sum(attended[before:after]) / (after - before)
    assert sum(attended[start:end]) / (end - start) > 5 * mean  # the answer is copied from there
    assert all(layer["retained"][-1] == layer["num_kv_heads"] for layer in kept["layers"])
    page = call("explain", "quarter.kvc", QUESTION, "--html", "kept.html", "--no-answer")
    assert page.out.strip() == str((place / "kept.html").resolve())
    silent = call("explain", "quarter.kvc", QUESTION, "--json", "--no-answer")
    assert json.loads(silent.out)["methods"][0]["attended"] is None
    refused(call("explain", "quarter.kvc", QUESTION, "--method", "snapkv"), "--method 'snapkv' has no place here")
    refused(call("explain", "quarter.kvc", QUESTION, "--chunk-budget", "9"), "--chunk-budget 9 has no place here")


def test_several_documents_are_one_file_each(place: Path, call: Callable[..., Result]) -> None:
    options = ["--chunk", "50", "--budget", "25%", "--store", "int8", "--max-memory", "2MB"]
    result = call("read", "doc.txt", "other.txt", "-o", "kept/", "--model", "model", "--json", *options)
    assert result.code == 0
    told = json.loads(result.out)
    assert [one["file"] for one in told] == [str(Path("kept", name)) for name in ("doc.kvc", "other.kvc")]
    assert [one["mean_retained"] / one["num_tokens"] for one in told] == pytest.approx([0.25, 0.25], abs=0.01)
    assert {one["store"] for one in told} == {"int8"}
    assert sorted(path.name for path in (place / "kept").iterdir()) == ["doc.kvc", "other.kvc"]


def test_what_cannot_be_read_or_written_is_refused(kept: Path, place: Path, call: Callable[..., Result]) -> None:
    base = ["--model", "model"]
    refused(call("read", "doc.txt", "-o", "doc.txt", *base), "--output 'doc.txt' would replace the document itself")
    refused(call("read", "doc.txt", "-o", "model/config.json", *base), "would replace the model itself")
    (place / "notes.md").write_text("mine", encoding="utf-8")
    refused(call("read", "doc.txt", "-o", "notes.md", *base), "--output 'notes.md' exists and is no session")
    for name in ("one.kvc", "new", "doc.kvc"):
        refused(call("read", "doc.txt", "other.txt", "-o", name, *base), "a file: name a folder for 2 documents")
    refused(call("read", "doc.txt", "other.txt", "-o", "new", *base), "for 2 documents, 'new/' makes one\n")
    refused(call("read", "doc.txt", "doc.txt", *base), "several documents would be written to doc.kvc")
    refused(call("read", "doc.kvc", *base), "document 'doc.kvc' is a session: it was read before")
    refused(call("read", "none.txt", *base), "document 'none.txt'")
    refused(call("read", "doc.txt", "--budget", "0", *base), "--budget '0' must be at least 1 token")
    refused(call("read", "doc.txt", "--max-memory", "5", *base), "--max-memory '5' must be a size such as 500MB")
    refused(call("read", "doc.txt", "--max-memory", "5kB", *base), "--max-memory 5000 is too little")
    refused(
        call("read", "doc.txt", "--set", "x=1", *base), "--set 'x=1' is an option of a method: name that by --method"
    )
    refused(call("read", "doc.txt", "--chunk", "0", *base), "--chunk 0 must be at least 1")
    refused(call("session", "show", "doc.txt"), "'doc.txt' is not a session: make one with `compresskv read`")
    refused(call("ask", "doc.kvc", QUESTION, "--budget", "3"), "--budget '3' has no place here")
    refused(call("ask", "doc.kvc", QUESTION, "--two-pass"), "--two-pass has no place here")
    refused(call("ask", "doc.kvc", " "), "the question is empty")
    refused(call("chat", "doc.kvc", "--chunk", "3"), "--chunk 3 has no place here")
    refused(call("chat", "-"), "document '-' is standard input, from which your questions come: name a file")
    refused(call("session", "show", "."), "session '.' is a folder: give a file")
    refused(call("read", "doc.txt", "other.txt", "-o", "/proc/xx/", *base), "--output '/proc/xx' cannot be a folder")
    damaged = place / "damaged.kvc"
    damaged.write_bytes(kept.read_bytes()[:-9])
    refused(call("ask", "damaged.kvc", QUESTION), "session 'damaged.kvc' is damaged")
    refused(call("session", "show", "damaged.kvc"), "session 'damaged.kvc' is damaged: it has ")
    for length in (8, 9, 30, 300, 1000):
        damaged.write_bytes(kept.read_bytes()[:length])
        refused(call("ask", "damaged.kvc", QUESTION), "session 'damaged.kvc' is damaged: its head ")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--budget", "0"],
        ["--store", "int9"],
        ["--max-memory", "5"],
        ["--chunk", "0"],
        ["--method", "nothing"],
        ["--set", "x=1"],
        ["none.txt"],
    ],
)
def test_nothing_is_made_or_loaded_where_something_else_is_wrong(
    place: Path, call: Callable[..., Result], wrong: list[str]
) -> None:
    refused(call("read", "doc.txt", "other.txt", "-o", "new/er/", *wrong, "--model", "no/model"))
    assert not (place / "new").exists()


def test_a_folder_may_have_a_dot_in_its_name(place: Path, call: Callable[..., Result]) -> None:
    (place / "kept.kvc").mkdir()
    for name in ("kept.v2/", "kept.v2", "kept.kvc"):
        assert call("read", "doc.txt", "other.txt", "-o", name, "--model", "model", "--method", "full").code == 0
        assert (place / name / "doc.kvc").exists()


def test_what_ends_in_a_slash_is_a_folder_though_none_is_there(place: Path, call: Callable[..., Result]) -> None:
    assert call("read", "doc.txt", "-o", "fresh/er/", "--model", "model", "--method", "full").code == 0
    assert (place / "fresh" / "er" / "doc.kvc").is_file()


def test_reading_replaces_no_session_but_the_same_documents(
    kept: Path, place: Path, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", "model", "--method", "full"]
    (place / "mine.kvc").write_bytes(kept.read_bytes())
    told = "--output 'mine.kvc' is a session of doc.txt: name another file"
    refused(call("read", "other.txt", "-o", "mine.kvc", *options), told)
    assert call("read", "doc.txt", "-o", "mine.kvc", *options).code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n/save\n"))
    assert "saved: mine.kvc" in call("chat", "mine.kvc").err
    told = "--output 'mine.kvc' is a session with a conversation"
    refused(call("read", "doc.txt", "-o", "mine.kvc", *options), told)


def test_a_conversation_is_saved_over_nothing_but_itself(
    kept: Path, place: Path, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine", "yours", "doc-2", "text"):
        (place / f"{name}.kvc").write_bytes(kept.read_bytes())
    (place / "notes.md").write_text("mine", encoding="utf-8")
    (place / "text.txt").write_bytes((place / "doc.txt").read_bytes())
    (place / "link.kvc").symlink_to("yours.kvc")
    before = {path: path.read_bytes() for path in place.iterdir() if path.is_file()}
    told = {
        "text.txt": "'text.txt' would replace the document itself",
        "notes.md": "'notes.md' exists and is no session",
        "model/config.json": "would replace the model itself",
        "yours.kvc": "'yours.kvc' is another session: name another file",
        "link.kvc": "'link.kvc' is another session",
        ".": "'text.kvc' is another session: name another file",
        "~nosuchuser/x.kvc": "'~nosuchuser/x.kvc' cannot be written: ",
        "a\0b": "cannot be written: ",
        "n" * 300: "cannot be written: File name too long",
        "/proc/xx/x.kvc": "'/proc/xx/x.kvc' cannot be written: ",
    }
    lines = [*(f"/save {name}" for name in told), "/save", "/save", QUESTION, "/save talks/"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    result = call("chat", "text.txt", "--model", "model", "--method", "full")
    assert (result.code, result.out.strip()) == (0, ANSWER)
    assert [problem for problem in told.values() if problem not in result.err] == []
    assert result.err.count("saved: text-2.kvc") == 2
    assert "saved: talks/text.kvc" in result.err
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("/save\n/save yours.kvc\n/save ./mine.kvc\n/save new.kvc\n/save new.kvc")
    )
    result = call("chat", "mine.kvc")
    assert result.err.count("saved: mine.kvc") == 2
    assert result.err.count("saved: new.kvc") == 2
    changed = [path.name for path, data in before.items() if path.name != "mine.kvc" and path.read_bytes() != data]
    assert changed == []


def test_chat_reads_as_it_is_told_to(place: Path, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--model", "model", "--method", "snapkv", "--set", "window_size=4", "--budget", "30"]
    refused(call("chat", "doc.txt", *given, "--max-memory", "5kB"), "--max-memory 5000 is too little")
    monkeypatch.setattr(sys, "stdin", io.StringIO("/save parts.kvc"))
    assert call("chat", "doc.txt", *given, "--max-memory", "300kB").code == 0
    facts = json.loads(call("session", "show", "parts.kvc", "--json").out)
    assert (facts["method"], facts["budget"]) == ("snapkv[window_size=4]", 30)


def test_a_line_that_is_no_text_ends_no_conversation(
    kept: Path, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = b"caf\xe9?\n/save caf\xe9.kvc\n" + QUESTION.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said), encoding="utf-8"))
    result = call("chat", "doc.kvc")
    assert (result.code, result.out.strip()) == (0, ANSWER)
    assert result.err.count("that line is not UTF-8 text: say it again") == 2
    assert "ends at" not in result.err
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION))
    assert call("chat", "doc.kvc", "--max-new-tokens", "2").err.endswith("[the answer ends at --max-new-tokens 2]\n")


def test_a_conversation_comes_from_standard_input(
    kept: Path, place: Path, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [QUESTION, "", "/stats", "/save talk.kvc", "/nope", "/forget", "What of birch?", "/forget", "/stats"]
    lines += ["/quit", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    result = call("chat", "doc.kvc")
    assert result.code == 0
    assert result.out.splitlines() == [ANSWER, OTHER]
    words = ("100% kept", "saved: talk.kvc", "/nope is no command", " 0 tokens of the conversation")
    assert [word for word in words if word not in result.err] == []
    (said,) = re.findall(r" [1-9]\d* tokens of the conversation", result.err)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/stats\n"))
    again = call("chat", "talk.kvc").err
    assert said in again
    assert f"; goes on behind 1 turn, the last: '{QUESTION}'; /help" in again
    (turn,) = json.loads(call("session", "show", "talk.kvc", "--json").out)["turns"]
    assert (turn["number"], turn["question"], turn["answer"]) == (1, QUESTION, ANSWER)
    assert said.split()[0] == str(turn["num_tokens"])
    shown = call("session", "show", "talk.kvc").out
    assert re.search(rf"(?m)^ +1 +{turn['num_tokens']} +{re.escape(QUESTION)} +{ANSWER} *$", shown)


def test_a_text_is_read_for_a_conversation(
    place: Path, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n/save\n"))
    monkeypatch.chdir(place)
    result = call("chat", "other.txt", "--model", "model", "--method", "full")
    assert result.out.splitlines() == [ANSWER]
    assert (place / "other.kvc").exists()


def test_a_session_of_weights_that_others_quantised_is_opened(place: Path, call: Callable[..., Result]) -> None:
    if not (place / "quantised").exists():
        given = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
        model = AutoModelForCausalLM.from_pretrained(place / "model", quantization_config=given, dtype=torch.float32)
        model.save_pretrained(place / "quantised")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(place / "model" / name, place / "quantised")
    assert call("read", "doc.txt", "-o", "quantised.kvc", "--model", "quantised", "--method", "full").code == 0
    assert "float32 (torchao)" in call("session", "show", "quantised.kvc").out
    assert call("ask", "quantised.kvc", QUESTION).out.strip() == ANSWER
    refused(call("ask", "quantised.kvc", QUESTION, "--dtype", "bfloat16"), "leave it out for float32\n")
