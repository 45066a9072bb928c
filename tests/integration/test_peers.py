"""kvpress for real, in the environment that `scripts/peers` makes, beside our own full cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from compresskv.calibration.haystack import read_haystack
from compresskv.errors import ConfigError
from compresskv.evaluation.fidelity import reference
from compresskv.evaluation.press_request import PressCase, PressRequest
from compresskv.models.decoding import prefill
from compresskv.models.load import load
from compresskv.peers.process import peers_python, run_peers

pytestmark = pytest.mark.slow

NUM_CONTEXT, BUDGET, ALL, IN_BYTES = 390, 100, 10_000, "25% of bytes"
FREEING, MASKING = "SnapKVPress", "AdaKVPress(SnapKVPress)"
QUESTION = "\n\nIn one sentence: what is this text about?\n"
Rows = dict[tuple[str, int | str, str], dict[str, Any]]


def _python() -> Path:
    try:
        return peers_python()
    except ConfigError:
        return pytest.skip("there is no environment for kvpress: scripts/peers makes .venv-peers")


@pytest.fixture(scope="module")
def case() -> PressCase:
    """A prompt, and what the full cache answers. In float32, where the order of sums decides no arg-max."""
    _python()
    model, tokenizer = load(dtype="float32", device="cpu")
    context = tokenizer(" ".join(read_haystack()), verbose=False)["input_ids"][:NUM_CONTEXT]
    ids = [*context, *tokenizer(QUESTION)["input_ids"]]
    cache = DynamicCache()
    first = int(prefill(model, torch.tensor([ids]), cache).argmax())
    full = reference(model, tokenizer, cache, first, 12)
    return PressCase("t", "1", tuple(ids), 12, NUM_CONTEXT, tuple(full.token_ids))


@pytest.fixture(scope="module")
def rows(case: PressCase) -> Rows:
    """Results by (press, budget, setting)."""
    budgets, settings = (BUDGET, ALL, IN_BYTES), ("aware", "agnostic")
    request = PressRequest("smollm2-135m", (case,), (FREEING, MASKING), budgets, settings, "float32", "cpu")
    found = list(run_peers(_python(), request, "compresskv.evaluation.press_runner"))
    assert [row.get("error") for row in found] == [None] * 12
    return {(row["method"].removeprefix("kvpress:"), row["budget"], row["setting"]): row for row in found}


@pytest.mark.parametrize("press", [FREEING, MASKING])
@pytest.mark.parametrize("setting", ["aware", "agnostic"])
def test_a_press_retains_exactly_its_budget(rows: Rows, case: PressCase, press: str, setting: str) -> None:
    row = rows[press, BUDGET, setting]
    num_compressed = len(case.input_ids) if setting == "aware" else NUM_CONTEXT
    num_suffix = len(case.input_ids) - num_compressed

    assert row["retained_tokens"] == row["logical_tokens"] == BUDGET + num_suffix
    assert row["compressed_tokens"] == num_compressed
    assert rows[press, ALL, setting]["retained_tokens"] == len(case.input_ids)


def test_bytes_are_those_really_held(rows: Rows, case: PressCase) -> None:
    nbytes_a_token = 30 * 2 * 3 * 64 * 4  # layers, keys and values, KV heads, head size, float32
    full = len(case.input_ids) * nbytes_a_token

    assert rows[FREEING, BUDGET, "aware"]["kv_nbytes"] == BUDGET * nbytes_a_token
    assert rows[MASKING, BUDGET, "aware"]["kv_nbytes"] == full
    assert rows[MASKING, BUDGET, "aware"]["held_tokens"] == len(case.input_ids)
    assert {row["kv_nbytes_full"] for key, row in rows.items() if key[2] == "aware"} == {full}


@pytest.mark.parametrize("setting", ["aware", "agnostic"])
def test_a_budget_in_bytes_is_held_by_a_press_that_frees_and_unmasked_by_one_that_does_not(
    rows: Rows, case: PressCase, setting: str
) -> None:
    freed, masked = rows[FREEING, IN_BYTES, setting], rows[MASKING, IN_BYTES, setting]

    assert freed["kv_nbytes"] == freed["kv_nbytes_full"] // freed["compressed_tokens"] * (
        freed["compressed_tokens"] // 4
    )
    assert masked["kv_nbytes"] == masked["kv_nbytes_full"]
    assert masked["retained_tokens"] == freed["retained_tokens"]


@pytest.mark.parametrize("press", [FREEING, MASKING])
@pytest.mark.parametrize("setting", ["aware", "agnostic"])
def test_a_budget_above_the_prompt_answers_as_the_full_cache(
    rows: Rows, case: PressCase, press: str, setting: str
) -> None:
    row = rows[press, ALL, setting]

    assert tuple(row["token_ids"]) == case.reference_ids
    assert row["top1_agreement"] == 1
    assert row["kl_divergence"] < 1e-4


def test_what_a_press_loses_is_told(rows: Rows) -> None:
    assert all(0 <= row["top1_agreement"] <= 1 for row in rows.values())
    assert all(row["kl_divergence"] > 1e-3 for (_, budget, _), row in rows.items() if budget == BUDGET)


def test_a_case_that_fails_leaves_the_others_their_results(case: PressCase) -> None:
    uncut = PressCase(case.task, "uncut", case.input_ids, 2)
    request = PressRequest("smollm2-135m", (uncut,), (MASKING,), (BUDGET,), ("agnostic", "aware"), peer_budget="bytes")

    failed, done = run_peers(_python(), request, "compresskv.evaluation.press_runner")

    assert failed["error"].startswith("the prompt has no suffix to hold back")
    assert (done["retained_tokens"], done["logical_tokens"]) == (len(case.input_ids), BUDGET)
    assert done["top1_agreement"] is done["kl_divergence"] is None
