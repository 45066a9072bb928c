"""`compresskv explain` as its users meet it: the page in a real browser, and what the command refuses."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import planted
from compresskv.cli.app import app
from compresskv.errors import CompressKVError
from compresskv.explain.page import retention_page
from compresskv.explain.retention import Explanation, LayerRetention, Report, Retention
from compresskv.explain.text import PromptText

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--virtual-time-budget=5000",
]
QUESTION = "What of amber?"
INERT = "<img src=x onerror=document.title='run'> </script><script>document.title='run'</script>"

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: install it to test the page")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a document with a needle and with markup."""
    folder = tmp_path_factory.mktemp("explain")
    planted.save(folder / "model")
    sentences = planted.haystack_sentences(30)
    sentences.insert(10, planted.needle("amber"))
    sentences.insert(20, INERT)
    (folder / "doc.txt").write_text("\n".join(sentences), encoding="utf-8")
    return folder


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the command in the folder of documents."""
    monkeypatch.chdir(place)

    def run(*args: str) -> Any:
        options = ["--model", "model", "--method", "snapkv", "--budget", "40"]
        return CliRunner().invoke(app, ["explain", "doc.txt", QUESTION, *options, *args])

    return run


class Dom(HTMLParser):
    """A page after its script ran: the elements, and the text of each that has an id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens: list[tuple[str, list[str]]] = []
        self.tags: list[str] = []
        self.texts: dict[str, str] = {}
        self.attrs: dict[str, dict[str, str | None]] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        known = dict(attrs)
        self.tags.append(tag)
        if known.get("data-i"):
            self.tokens.append(("", (known.get("class") or "").split()))
        if known.get("id"):
            self.attrs[known["id"]] = known
        if tag not in {"meta", "link", "input", "img"}:
            self._open.append((tag, known.get("id")))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        names = [name for _, name in self._open if name]
        for name in names:
            self.texts[name] = self.texts.get(name, "") + data
        if "text" in names and self._open[-1][0] == "span":
            text, classes = self.tokens[-1]
            self.tokens[-1] = (text + data, classes)


def opened(page: Path, tmp_path: Path, fragment: str = "") -> Dom:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", page.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return Dom(done.stdout.decode("utf-8"))


@needs_browser
class TestInBrowser:
    @pytest.fixture
    def page(self, call: Callable[..., Any], place: Path) -> Path:
        done = call("--compare", "streaming_llm", "--evidence", "amber1 amber2", "--html", "page.html")
        assert done.exit_code == 0, done.output
        assert done.stdout == f"{(place / 'page.html').resolve()}\n"
        return place / "page.html"

    @pytest.fixture
    def data(self, page: Path, call: Callable[..., Any]) -> Any:
        return json.loads(call("--compare", "streaming_llm", "--evidence", "amber1 amber2", "--json").stdout)

    def test_shows_header_and_every_token_shaded_by_its_share(self, page: Path, data: Any, tmp_path: Path) -> None:
        dom = opened(page, tmp_path)
        method = data["methods"][0]
        assert [text for text, _ in dom.tokens] == data["prompt"]["texts"]
        assert (dom.texts["question"], dom.texts["document"]) == (QUESTION, "doc.txt")
        assert dom.texts["answer"] == method["answer"]
        assert "snapkv" in dom.texts["facts"]
        assert f"{len(dom.tokens)} tokens" in dom.texts["facts"]
        for token, (_, classes) in enumerate(dom.tokens):
            shares = [layer["retained"][token] / layer["num_kv_heads"] for layer in method["layers"]]
            share = sum(shares) / len(shares)
            assert levels(classes) == ([] if share == 0 else [max(1, -int(-(share * 10 - 1e-6) // 1))])
        (start, end), *_ = data["prompt"]["evidence"]
        assert [token for token, (_, classes) in enumerate(dom.tokens) if "e" in classes] == list(range(start, end))

    def test_a_link_selects_method_layer_and_token(self, page: Path, data: Any, tmp_path: Path) -> None:
        layer = data["methods"][1]["layers"][1]
        dom = opened(page, tmp_path, "#method=streaming_llm&layer=1&token=7")
        for token, (_, classes) in enumerate(dom.tokens):
            assert bool(levels(classes)) == (layer["retained"][token] > 0)
        assert dom.attrs["layer"]["aria-valuetext"] == "Layer 1"
        assert dom.texts["state"].startswith(f"Layer 1 keeps {40} of {len(dom.tokens)} tokens")
        assert "Token 7 of" in dom.texts["tip"]
        assert re.search(r"Kept in \d of 3 layers; (not )?in layer 1", dom.texts["tip"])
        assert dom.texts["answer"] == data["methods"][1]["answer"]

    def test_markup_in_the_document_stays_text(self, page: Path, tmp_path: Path) -> None:
        dom = opened(page, tmp_path)
        assert "img" not in dom.tags
        assert dom.tags.count("script") == 2


@needs_browser
def test_a_token_that_30_layers_of_3_heads_keep_has_the_darkest_shade(tmp_path: Path) -> None:
    # Float32 sums of thirds are a little above 1.
    prompt = PromptText(("a", "b"), (False, False), slice(0, 2), slice(2, 2))
    layers = tuple(LayerRetention(number, 3, (3, number % 3)) for number in range(30))
    explanation = Explanation("blend", 64, Retention(layers), 2, 1, None)
    (tmp_path / "page.html").write_text(retention_page(Report("m", "d", "q", 0, prompt, (explanation,), "float32")))
    dom = opened(tmp_path / "page.html", tmp_path)
    assert [levels(classes) for _, classes in dom.tokens] == [[10], [4]]


def levels(classes: list[str]) -> list[int]:
    return [int(name[1:]) for name in classes if re.fullmatch(r"s\d+", name)]


class TestCommand:
    def test_writes_retention_html_by_default_and_leaves_the_answer_out(
        self, call: Callable[..., Any], place: Path
    ) -> None:
        done = call("--no-answer")
        assert done.exit_code == 0, done.output
        assert done.stdout.strip() == str((place / "retention.html").resolve())
        data = json.loads(call("--max-new-tokens", "0", "--json").stdout)
        assert data["methods"][0]["answer"] is None
        assert data["dtype"] == "float32"

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["--evidence", "nowhere"], ["--evidence", "'nowhere'"]),
            (["--html", "missing/page.html"], ["--html", "missing"]),
            (["--html", "."], ["--html", "folder"]),
            (["--html", "doc.txt"], ["doc.txt", "replace the document"]),
            (["--html", "page.html", "--json"], ["--html", "--json"]),
            (["--max-new-tokens", "-1"], ["--max-new-tokens -1"]),
            (["--compare", "snapkw"], ["--compare 'snapkw'", "snapkv"]),
            (["--set", "lookahead=2"], ["lookahead=2", "nothing is evicted before the answer"]),
        ],
    )
    def test_refuses_with_one_line(self, call: Callable[..., Any], args: list[str], words: list[str]) -> None:
        error = call(*args).exception
        assert isinstance(error, CompressKVError)
        assert "\n" not in str(error)
        for word in words:
            assert word in str(error)
