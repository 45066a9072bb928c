"""LongBench: how a row becomes a prompt, what malformed data says, and its scores."""

import json
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from compresskv.errors import ConfigError, DataError
from compresskv.evaluation.tasks import longbench
from compresskv.evaluation.tasks.base import TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.longbench import LongBench
from compresskv.evaluation.tasks.registry import create_task

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
VECTORS = SHARED / "longbench_metric_vectors.jsonl"
SUBSETS = LongBench.default_subsets
PROMPTS = dict.fromkeys(SUBSETS, "Read.\n{context}\nAsk: {input}\nSay:") | {
    "qmsum": "{input}, now read:\n{context}",
    "lcc": "Go on.\n{context}Next:\n",
    "samsum": "{context}",
}


def row(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"input": "Who?", "context": "A text.", "answers": ["Ann", "Ann B."], "length": 2}
    fields |= {"dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": "one"} | changes
    return {name: value for name, value in fields.items() if value is not ...}


def write(folder: Path, subset: str, *rows: object) -> None:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    (folder / f"{subset}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """DATA/longbench with templates and no rows."""
    folder = tmp_path / "longbench"
    folder.mkdir()
    (folder / "dataset2prompt.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    (folder / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(SUBSETS, 32)), encoding="utf-8")
    return folder


def examples(data: Path | None, *subsets: str, limit: int | None = None) -> list[Example]:
    # A task that takes its prompts from files needs no tokenizer.
    return LongBench().examples(TaskSettings(None, data=data, subsets=subsets, limit=limit))  # type: ignore[arg-type]


def test_a_row_becomes_an_example(data: Path) -> None:
    write(data, "hotpotqa", row())
    (example,) = examples(data.parent)
    assert (example.task, example.id, example.chat) == ("longbench/hotpotqa", "one", True)
    assert (example.prefix, example.context, example.suffix) == ("Read.\n", "A text.", "\nAsk: Who?\nSay:")
    assert (example.answers, example.max_new_tokens) == (("Ann", "Ann B."), 32)
    assert example.meta == {"length": 2, "category": "multi-doc QA"}


def test_the_files_may_lie_in_the_folder_itself(data: Path) -> None:
    write(data, "hotpotqa", row())
    assert examples(data) == examples(data.parent)


def test_the_question_may_come_first(data: Path) -> None:
    write(data, "qmsum", row())
    (example,) = examples(data)
    assert (example.prefix, example.suffix) == ("Who?, now read:\n", "")


@pytest.mark.parametrize("text", ["{", "}}", "{input}", "{context}", "{0} {x!r:>9}", "%s \\n"])
def test_braces_in_the_data_mean_nothing(data: Path, text: str) -> None:
    write(data, "hotpotqa", row(input=text, context=text))
    (example,) = examples(data)
    assert example.prompt == f"Read.\n{text}\nAsk: {text}\nSay:"


@pytest.mark.parametrize("question", ["", None, ...])
def test_code_has_no_question(data: Path, question: object) -> None:
    write(data, "lcc", row(input=question, context="x = {}\n"))
    (example,) = examples(data)
    assert (example.prompt, example.chat) == ("Go on.\nx = {}\nNext:\n", False)


def test_chat_templates_are_for_these(data: Path) -> None:
    for subset in SUBSETS:
        write(data, subset, row(all_classes=["Ann", "Bob"]))
    plain = {example.task.split("/")[1] for example in examples(data) if not example.chat}
    assert plain == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
    assert [example.task.split("/")[1] for example in examples(data)] == list(SUBSETS)


def test_classes_go_along(data: Path) -> None:
    write(data, "trec", row(all_classes=["Ann", "Bob"]))
    (example,) = examples(data)
    assert example.meta == {"length": 2, "category": "few-shot", "all_classes": ["Ann", "Bob"]}


def test_limit_and_subsets(data: Path) -> None:
    write(data, "hotpotqa", *(row(_id=str(i)) for i in range(5)))
    write(data, "musique", row())
    assert [example.id for example in examples(data, limit=2)] == ["0", "1", "one"]
    assert [example.task for example in examples(data, "musique")] == ["longbench/musique"]


def test_what_the_line_holds_is_kept(data: Path) -> None:
    """U+2028 ends no line, a byte-order mark and blank lines are no rows."""
    text = "one\u2028two\x85three"
    lines = ["\ufeff" + json.dumps(row(context=text), ensure_ascii=False), "", json.dumps(row(_id="two")) + "\r"]
    write(data, "hotpotqa", *lines)
    assert [example.context for example in examples(data)] == [text, "A text."]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"context": ...}, "field 'context' is missing"),
        ({"context": 7}, "field 'context' is a whole number, not text"),
        ({"context": " "}, "field 'context' is empty"),
        ({"input": ["x"]}, "field 'input' is a list, not text or null"),
        ({"answers": "Ann"}, "field 'answers' is text, not a list"),
        ({"answers": []}, "field 'answers' is empty"),
        ({"answers": ["Ann", 1]}, "field 'answers[1]' is a whole number, not text"),
        ({"length": "2"}, "field 'length' is text, not a whole number"),
        ({"length": True}, "field 'length' is true or false, not a whole number"),
        ({"length": -1}, "field 'length' is not a whole number >= 0"),
        ({"all_classes": "Ann"}, "field 'all_classes' is text, not a list or null"),
        ({"_id": ...}, "field '_id' is missing"),
        ({"_id": "zero"}, "the _id 'zero' occurs twice"),
    ],
)
def test_malformed_row(data: Path, changes: dict[str, Any], says: str) -> None:
    write(data, "hotpotqa", row(_id="zero"), "", row(**changes))
    with pytest.raises(DataError) as err:
        examples(data)
    assert str(err.value) == f"hotpotqa.jsonl line 3: {says}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{}\n{"input": ', " line 2: not valid JSON: .+"),
        (b"{}\n[1]", " line 2: it is a list, not an object"),
        (b"{}\n" + b"[" * 100_000, " line 2: not valid JSON: .+"),
        (b'{}\n{"input": "\xff"}', " line 2: not UTF-8 text"),
        (b"\n\n", ": the file holds no rows"),
    ],
    ids=["cut", "list", "deep", "bytes", "blank"],
)
def test_malformed_file(data: Path, content: bytes, says: str) -> None:
    (data / "hotpotqa.jsonl").write_bytes(content.replace(b"{}", json.dumps(row()).encode()))
    with pytest.raises(DataError, match=rf"^hotpotqa\.jsonl{says}$"):
        examples(data)


def test_trec_needs_its_classes(data: Path) -> None:
    write(data, "trec", row())
    with pytest.raises(DataError, match=r"^trec\.jsonl line 1: field 'all_classes' is empty or missing$"):
        examples(data)


def test_a_missing_file_counts_only_if_asked_for(data: Path) -> None:
    write(data, "hotpotqa", row())
    assert len(examples(data)) == 1
    with pytest.raises(DataError, match=r"no qasper\.jsonl and no lcc\.jsonl$"):
        examples(data, "hotpotqa", "qasper", "lcc")


def test_unknown_subset(data: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'hotpotqa'"):
        examples(data, "hotpot_qa")


@pytest.mark.parametrize("name", ["dataset2prompt.json", "dataset2maxlen.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"hotpotqa": true}'])
def test_templates_are_needed(data: Path, name: str, content: str | None) -> None:
    write(data, "hotpotqa", row())
    if content is None:
        (data / name).unlink()
    else:
        (data / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"{name}.*") as err:
        examples(data)
    assert "\n" not in str(err.value)


@pytest.mark.parametrize(
    "template", ["{input}", "{context} {", "{context} {context}", "{context} {0}", "{context} {a.b}"]
)
def test_malformed_template(data: Path, template: str) -> None:
    write(data, "hotpotqa", row())
    (data / "dataset2prompt.json").write_text(json.dumps({"hotpotqa": template}), encoding="utf-8")
    with pytest.raises(DataError, match=r"^dataset2prompt\.json: the prompt for 'hotpotqa' has "):
        examples(data)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data=None: task 'longbench' needs a folder with dataset2prompt\.json"):
        examples(None)
    with pytest.raises(DataError, match=r"nothing': no such folder; .*dataset2prompt\.json"):
        examples(tmp_path / "nothing")


class TestHub:
    """No rows on disk: they come from the hub's archive."""

    @pytest.fixture(autouse=True)
    def reachable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(longbench, "is_reachable", lambda *_: True)

    @pytest.fixture
    def archive(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "data.zip"

        def download(repository: str, name: str, repo_type: str) -> str:
            assert (repository, name, repo_type) == ("THUDM/LongBench", "data.zip", "dataset")
            return str(path)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return path

    def test_rows(self, data: Path, archive: Path) -> None:
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("data/musique.jsonl", json.dumps(row()) + "\n" + json.dumps(row(_id="two")))
            file.writestr("data/lcc.jsonl", "[]")
        assert [example.id for example in examples(data, "musique")] == ["one", "two"]
        with pytest.raises(DataError, match=r"^lcc\.jsonl line 1: it is a list, not an object$"):
            examples(data)
        with pytest.raises(DataError, match=r"no hotpotqa\.jsonl$"):
            examples(data, "hotpotqa")

    def test_damaged_archive(self, data: Path, archive: Path) -> None:
        archive.write_bytes(b"no archive")
        with pytest.raises(DataError, match=r"^no rows in .* File is not a zip file; put LongBench's"):
            examples(data)

    def test_a_hub_that_is_away_is_told_at_once(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(longbench, "is_reachable", lambda *_: False)
        with pytest.raises(DataError, match=r"LongBench, cannot be reached: put LongBench's \*.jsonl into"):
            examples(data)

    def test_offline(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def download(*args: object, **kwargs: object) -> str:
            raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub\nand more")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        with pytest.raises(DataError) as err:
            examples(data)
        assert "THUDM/LongBench: cannot reach the hub; put LongBench's *.jsonl into" in str(err.value)


def scored(subset: str, prediction: str, *answers: str, classes: tuple[str, ...] = ()) -> float:
    meta = {"all_classes": list(classes)}
    example = Example(f"longbench/{subset}", "one", "", "A text.", "", answers, 8, meta=meta)
    scores = LongBench().score(example, prediction)
    assert set(scores) == set(LongBench.metrics)
    return scores["score"]


@pytest.mark.parametrize(
    ("subset", "prediction", "answers", "score"),
    [
        ("hotpotqa", "The Nile.", ("Congo", "nile"), 1),
        ("hotpotqa", "Nile\nQuestion: more", ("nile",), 1 / 2),  # every line counts
        ("triviaqa", "\n\nNile\nQuestion: more", ("nile",), 1),  # only the first
        ("samsum", "Ann is in.\nDialogue: more", ("Ann is in.",), 1),
        ("gov_report", "a b c d", ("a c d e",), 3 / 4),
        ("trec", "City\nType: Date", ("City",), 1),
        ("trec", "City Date", ("City",), 1 / 2),
        ("passage_count", "11 of 15", ("11",), 1 / 2),
        ("passage_retrieval_en", "Paragraph 7", ("Paragraph 7",), 1),
        ("lcc", "```\nx = 1\n```", ("x = 1",), 1),
    ],
)
def test_score(subset: str, prediction: str, answers: tuple[str, ...], score: float) -> None:
    assert scored(subset, prediction, *answers, classes=("City", "Date")) == pytest.approx(score, abs=1e-6)
    assert scored(subset, "\n", *answers, classes=("City", "Date")) == 0


def read(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        return [json.loads(line) for line in file]


@pytest.mark.skipif(not VECTORS.is_file(), reason="LongBench's own scores are not beside the checkout")
@pytest.mark.parametrize("subset", SUBSETS)
def test_scores_are_longbenchs_own(subset: str) -> None:
    rows = [vector for vector in read(VECTORS) if vector["dataset"] == subset]
    assert len(rows) == 12
    for vector in rows:
        classes = tuple(vector["all_classes"] or ())
        score = 100 * scored(subset, vector["prediction"], *vector["answers"], classes=classes)
        assert score == pytest.approx(vector["score"], abs=0.01), vector["prediction"]


@pytest.mark.skipif(not (SHARED / "longbench").is_dir(), reason="LongBench's rows are not beside the checkout")
def test_real_rows() -> None:
    templates = json.loads((SHARED / "longbench" / "dataset2prompt.json").read_text(encoding="utf-8"))
    cases = examples(SHARED)
    assert {example.task.split("/")[1] for example in cases} == set(SUBSETS)
    assert len({(example.task, example.id) for example in cases}) == len(cases)
    for subset in SUBSETS:
        rows = read(SHARED / "longbench" / f"{subset}.jsonl")
        mine = [example for example in cases if example.task == f"longbench/{subset}"]
        assert [example.prompt for example in mine] == [templates[subset].format(**fields) for fields in rows]
        assert [list(example.answers) for example in mine] == [fields["answers"] for fields in rows]
        assert all(create_task("longbench").score(example, example.answers[0])["score"] > 0.5 for example in mine)
