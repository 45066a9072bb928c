"""What the peers are asked to do, and what their process makes of it: kvpress itself is not needed for that."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tiny
from compresskv import compressing
from compresskv.errors import ConfigError, DataError
from compresskv.evaluation import press_runner
from compresskv.evaluation.fidelity import nearness, reference
from compresskv.evaluation.press_request import PressCase, PressRequest
from compresskv.models.decoding import prefill
from compresskv.peers.answers import read_request, write_request
from compresskv.peers.press_cache import PressCache
from compresskv.peers.presses import PRESSES, check_presses

CASE = PressCase("t", "1", (1, 2, 3), 8)
FIGURES = {"logical_tokens": 30.0, "held_tokens": 90.0}


def test_every_press_is_known_by_its_name() -> None:
    check_presses(PRESSES)
    check_presses([])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("NoSuchPress", r"did you mean 'FinchPress'\?"),
        ("ExpectedAttention", r"did you mean 'ExpectedAttentionPress'\?"),
        ("AdaKVPress(SnapKVPres)", r"did you mean 'AdaKVPress\(SnapKVPress\)'\?"),
        ("AdaKVPress(KnormPress)", r"did you mean "),
        ("h2o", r"choose from SnapKVPress, ExpectedAttentionPress, "),
    ],
)
def test_an_unknown_press_is_refused_where_the_request_is_made(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PressRequest("m", (), ("SnapKVPress", name), (30,))
    assert str(caught.value).startswith(f"peers={name!r} is unknown: ")
    caught.match(hint)


def test_a_request_that_cannot_work_is_refused_where_it_is_made() -> None:
    with pytest.raises(ConfigError, match="budget=0 must be at least 1"):
        PressRequest("m", (), (), budgets=(0,))
    with pytest.raises(ConfigError, match="settings='blind' is unknown"):
        PressRequest("m", (), (), (), settings=("blind",))
    with pytest.raises(ConfigError, match=r"^peer_budget='kb' is unknown: choose from tokens, bytes$"):
        PressRequest("m", (), (), (), peer_budget="kb")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"cases": [{"tusk": 1}]}', '{"cases": [], "modle": ""}', '{"cases": 1}']
)
def test_a_malformed_request_names_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "request.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"request\.json' is no request for peers"):
        read_request(path, PressRequest)


def test_what_a_request_says_of_itself_is_said_again_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    write_request(path, PressRequest("m", (CASE,), (), (30, 0.5)))
    assert read_request(path, PressRequest) == PressRequest("m", (CASE,), (), (30, 0.5))
    path.write_text(path.read_text(encoding="utf-8").replace("0.5", "1.5"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^budget=1\.5 "):
        read_request(path, PressRequest)


def test_each_configuration_is_run_once_and_none_that_is_done() -> None:
    request = PressRequest("m", (), ("SnapKVPress", "SnapKVPress"), (30, 0.5, 30), ("aware", "agnostic"))
    case = PressCase("t", "1", (), 8, done=("kvpress:SnapKVPress @ 30", "kvpress:SnapKVPress @ 50% (agnostic)"))

    assert request.pending(case) == [("aware", "SnapKVPress", 0.5), ("agnostic", "SnapKVPress", 30)]


def test_budgets_in_bytes_are_taken_and_those_that_a_prompt_decides_are_not() -> None:
    request = PressRequest("m", (), ("SnapKVPress",), ("3MB", "5% of bytes"))
    assert request.pending(CASE) == [("aware", "SnapKVPress", "3MB"), ("aware", "SnapKVPress", "5% of bytes")]
    with pytest.raises(ConfigError, match=r"^budgets='auto' depends on each prompt"):
        PressRequest("m", (), ("SnapKVPress",), ("auto",))


class FirstTokens:
    """Stands for a press that frees: keeps the first tokens."""

    def compress(self, model: Any, _: None, input_ids: torch.Tensor, budget: int, __: int | None) -> PressCache:
        cache, num_tokens = DynamicCache(), input_ids.shape[1]
        logits = prefill(model, input_ids, cache)
        for layer in cache.layers:
            layer.keys, layer.values = (states[:, :, :budget].clone() for states in (layer.keys, layer.values))
        return PressCache(model, cache, num_tokens, num_tokens, logits, 0.0, 0.0)


@pytest.mark.parametrize("setting", ["aware", "agnostic"])
@pytest.mark.parametrize("budget", ["25% of bytes", "6kB", "1GB"])
def test_a_press_retains_what_our_methods_do_of_a_budget_in_bytes(budget: str, setting: str) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(40)
    case = PressCase("t", "1", tuple(prompt[0].tolist()), 2, suffix_start=32)
    compressed = prompt if setting == "aware" else prompt[:, :32]
    with compressing(model, "streaming_llm", budget=budget) as cache:
        prefill(model, compressed, cache)

    found = press_runner.run_press((model, tiny.tokenizer()), FirstTokens(), case, budget, setting, None)  # type: ignore[arg-type]

    assert found["kv_nbytes"] == cache.nbytes
    with pytest.raises(ConfigError, match="budget='9B' has no room for one token"):
        press_runner.run_press((model, tiny.tokenizer()), FirstTokens(), case, "9B", setting, None)  # type: ignore[arg-type]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the process runs, where kvpress and the model are stand-ins; KnormPress fails."""
    calls: list[tuple[Any, ...]] = []

    def run_press(_: Any, chosen: Any, case: PressCase, budget: float, setting: str, full: None) -> dict[str, Any]:
        calls.append((case.example, chosen.name, budget, setting))
        if chosen.name == "KnormPress":
            raise RuntimeError("out of memory")
        return dict(FIGURES)

    monkeypatch.setattr(press_runner, "find_press", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(press_runner, "version", lambda _: "1")
    monkeypatch.setattr(press_runner, "load", lambda *_, **__: (None, None))
    monkeypatch.setattr(press_runner, "run_press", run_press)
    return calls


def test_the_process_skips_what_is_done(ran: list[tuple[Any, ...]]) -> None:
    done = PressCase("t", "2", (1,), 8, done=("kvpress:SnapKVPress @ 30",))

    rows = list(press_runner.answer(PressRequest("m", (CASE, done), ("SnapKVPress", "KnormPress"), (30,))))

    assert ran == [(*key, 30, "aware") for key in [("1", "SnapKVPress"), ("1", "KnormPress"), ("2", "KnormPress")]]
    assert [(row["example"], row["method"], row.get("error")) for row in rows] == [
        ("1", "kvpress:SnapKVPress", None),
        ("1", "kvpress:KnormPress", "out of memory"),
        ("2", "kvpress:KnormPress", "out of memory"),
    ]


@pytest.mark.parametrize(("unit", "counted"), [("tokens", 30), ("bytes", 90)])
def test_the_unit_says_which_tokens_a_press_is_charged_with(
    ran: list[tuple[Any, ...]], unit: str, counted: float
) -> None:
    (row,) = press_runner.answer(PressRequest("m", (CASE,), ("SnapKVPress",), (30,), peer_budget=unit))

    assert row["retained_tokens"] == counted
    assert {name: row[name] for name in FIGURES} == FIGURES
    assert len(ran) == 1


@pytest.mark.parametrize("answer", [(), (7,)])
def test_an_answer_of_one_token_is_compared_with_nothing(answer: tuple[int, ...]) -> None:
    assert press_runner.full_log_probs(tiny.tiny_model("llama"), replace(CASE, reference_ids=answer)) is None


def test_what_the_full_cache_thinks_is_measured_without_the_last_presss_masks() -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(40)
    cache = DynamicCache()
    first = int(prefill(model, prompt, cache).argmax())
    expected = reference(model, tiny.tokenizer(), cache, first, 6)
    case = PressCase("t", "1", tuple(prompt[0].tolist()), 6, reference_ids=tuple(expected.token_ids))
    attention: Any = model.model.layers[1].self_attn
    attention.masked_key_indices = (torch.tensor([0]),)

    found = press_runner.full_log_probs(model, case)

    assert found is not None
    assert attention.masked_key_indices is None
    del attention.masked_key_indices
    torch.testing.assert_close(found, expected.log_probs)
    assert nearness(found, expected.log_probs).top1_agreement == 1


def test_a_case_whose_full_cache_cannot_be_read_leaves_the_others(
    ran: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_: Any, case: PressCase) -> None:
        if case.example == "1":
            raise RuntimeError("out of memory")

    monkeypatch.setattr(press_runner, "full_log_probs", read)
    cases = (CASE, replace(CASE, example="2"))
    rows = list(press_runner.answer(PressRequest("m", cases, ("SnapKVPress",), (30,))))
    assert [(row["example"], row.get("error")) for row in rows] == [("1", "out of memory"), ("2", None)]
    assert ran == [("2", "SnapKVPress", 30, "aware")]
