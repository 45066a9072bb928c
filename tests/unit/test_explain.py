"""What `explain` says is kept is what the cache keeps, and the page shows any text as text."""

import base64
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import compresskv
import planted
import tiny
from compresskv.cache.cache import CompressedCache
from compresskv.cache.stores.ragged import RaggedStore
from compresskv.errors import ConfigError
from compresskv.explain.kept import explain_session
from compresskv.explain.page import retention_page
from compresskv.explain.retention import (
    Explanation,
    LayerRetention,
    Report,
    Retention,
    explain,
)
from compresskv.explain.text import PromptText, occurrences, prompt_text, token_texts
from compresskv.methods.prepare import prepare_method
from compresskv.methods.snapkv import SnapKV
from compresskv.prompts.prompt import build_prompt

NUM_TOKENS = 60
TEMPLATE = "{% for message in messages %}<begin>user: {{ message['content'] }}<end>\nassistant: {% endfor %}"
HOSTILE = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> <!-- & \u2028 \u2029 @data@ @script@ ' \" `"


def compressed(family: str, method: str, budget: int, num_tokens: int = NUM_TOKENS) -> CompressedCache:
    model = tiny.tiny_model(family)
    prompt = tiny.random_tokens(num_tokens)
    with compresskv.compressing(model, method, budget, **tiny.options_for(model, method)) as cache:
        tiny.read(model, cache, prompt, [num_tokens])
    return cache


class TestRetention:
    # one choice for all KV heads, one a head, ragged, decided together, unequal layers, everything
    @pytest.mark.parametrize("method", ["streaming_llm", "snapkv", "adakv", "headkv", "cake", "compresskv", "full"])
    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_counts_the_heads_that_keep_each_token(self, family: str, method: str) -> None:
        cache = compressed(family, method, budget=40)
        retention = Retention.of(cache)
        assert len(retention.layers) == len(cache.compressed_layers)
        for shown, layer in zip(retention.layers, cache.compressed_layers, strict=True):
            heads = tiny.kept_tokens(layer)[0]
            wanted = [sum(token in head for head in heads) for token in range(NUM_TOKENS)]
            assert list(shown.counts) == wanted
            assert (shown.layer_idx, shown.num_kv_heads) == (layer.layer_idx, len(heads))
            assert shown.num_retained == pytest.approx(layer.mean_retained)

    def test_the_methods_above_differ_in_what_they_share(self) -> None:
        shared = compressed("llama", "streaming_llm", 40).compressed_layers
        assert all(layer.positions is not None and layer.positions.shape[1] == 1 for layer in shared)
        layers = compressed("llama", "adakv", 40).compressed_layers
        assert any(isinstance(layer.store, RaggedStore) for layer in layers)
        assert all(layer.positions is None for layer in compressed("llama", "full", 40).compressed_layers)

    def test_decoding_changes_nothing(self) -> None:
        model = tiny.tiny_model("llama")
        prompt = tiny.random_tokens(NUM_TOKENS)
        with compresskv.compressing(model, "adakv", 40) as cache:
            tiny.read(model, cache, prompt, [NUM_TOKENS])
            before = Retention.of(cache)
            tiny.read(model, cache, torch.cat([prompt, prompt], dim=1), [1, 1, 3])
        assert Retention.of(cache) == before

    def test_names_sliding_models_layers_by_their_own_numbers(self) -> None:
        assert [layer.layer_idx for layer in Retention.of(compressed("gemma3", "snapkv", 40)).layers] == [1, 3, 4]

    def test_fractions_weigh_every_layer_alike(self) -> None:
        layers = (LayerRetention(0, 1, (1, 0, 0, 0)), LayerRetention(1, 4, (4, 2, 0, 0)))
        retention = Retention(layers)
        assert retention.fraction == pytest.approx((1 / 4 + 1.5 / 4) / 2)
        assert retention.fraction_of([slice(0, 2), slice(1, 3)]) == pytest.approx((1 / 3 + 1.5 / 3) / 2)

    def test_refuses_what_is_no_single_prompt(self) -> None:
        model = tiny.tiny_model("llama")
        with compresskv.compressing(model, "snapkv", 40) as cache:
            with pytest.raises(ValueError, match="whole prompt"):
                Retention.of(cache)
            tiny.read(model, cache, tiny.random_tokens(NUM_TOKENS, batch_size=2), [NUM_TOKENS])
        with pytest.raises(ValueError, match="2 prompts"):
            Retention.of(cache)

    def test_the_answer_is_that_of_ask(self) -> None:
        model, tokenizer = planted.model(), planted.tokenizer()
        document = " ".join([*planted.haystack_sentences(20), planted.needle("amber")])
        wanted = compresskv.ask(model, tokenizer, document, "What of amber?", method="snapkv", budget=40)
        prompt = build_prompt(tokenizer, document, "What of amber?").input_ids
        method = prepare_method(model, "snapkv")
        found = explain(model, tokenizer, prompt, method, 40, max_new_tokens=128)
        assert (found.answer, found.kv_nbytes) == (wanted.answer, wanted.stats.kv_nbytes)
        assert found.retention.fraction == pytest.approx(wanted.stats.retained_fraction)
        assert explain(model, tokenizer, prompt, method, 40).answer is None


class TestAttended:
    def test_is_what_the_models_own_attention_says(self) -> None:
        model, words = tiny.tiny_model("llama"), tiny.random_words(60)
        session = compresskv.read(model, tiny.tokenizer(), words, method="full", store="native")
        report = explain_session(session, "w1 w2 w3", max_new_tokens=5)
        answer = session.ask("w1 w2 w3", max_new_tokens=5).token_ids
        prompt = [*session.token_ids, *session.tokens_of("w1 w2 w3")]
        eager = tiny.tiny_model("llama", "eager")
        with torch.no_grad():
            output = eager(torch.tensor([[*prompt, *answer[:-1]]]), output_attentions=True)
        rows = torch.stack(output.attentions)[:, 0, :, len(prompt) - 1 :, : len(prompt)]
        expected = rows.mean(dim=(0, 1, 2)).tolist()
        assert report.explanations[0].attended == pytest.approx(expected, abs=1e-5)

    def test_what_was_evicted_has_none(self) -> None:
        session = compresskv.read(
            tiny.tiny_model("llama"), tiny.tokenizer(), tiny.random_words(60), method="adakv", budget=12
        )
        (found,) = explain_session(session, "w1 w2 w3", max_new_tokens=5).explanations
        assert found.attended is not None
        gone = [
            not any(layer.counts[token] for layer in found.retention.layers) for token in range(len(found.attended))
        ]
        assert any(gone)
        assert [share > 0 for share in found.attended] == [not one for one in gone]
        assert explain_session(session, "w1 w2 w3").explanations[0].attended is None


class TestTokenTexts:
    @pytest.mark.parametrize(
        "text",
        ["plain words\n\n\tand tabs  ", "naïve 鯨 🐳🐋 👩‍🚀", "🐳", "\ufffd here \ufffd", "\ufffd" * 40, HOSTILE],
    )
    def test_together_are_the_text(self, text: str) -> None:
        tokenizer = planted.bytes_tokenizer()
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = token_texts(tokenizer, token_ids)
        assert len(texts) == len(token_ids)
        assert "".join(texts) == text

    def test_a_character_of_several_tokens_stands_at_the_first(self) -> None:
        tokenizer = planted.bytes_tokenizer()
        token_ids = tokenizer("🐳!", add_special_tokens=False)["input_ids"]
        assert token_texts(tokenizer, token_ids) == ("🐳", "", "", "", "!")

    def test_a_prompt_that_ends_inside_a_character_ends(self) -> None:
        tokenizer = planted.bytes_tokenizer()
        token_ids = tokenizer("a🐳", add_special_tokens=False)["input_ids"][:3]
        assert token_texts(tokenizer, token_ids) == ("a", "\ufffd", "")

    def test_long_runs_of_replacement_characters_stay_quick_and_whole(self) -> None:
        tokenizer = planted.bytes_tokenizer()
        token_ids = tokenizer("\ufffd" * 1000, add_special_tokens=False)["input_ids"]
        assert "".join(token_texts(tokenizer, token_ids)) == "\ufffd" * 1000


def located(tokenizer: PreTrainedTokenizerBase, document: str, question: str, *evidence: str) -> PromptText:
    input_ids = build_prompt(tokenizer, document, question).input_ids[0].tolist()
    return prompt_text(tokenizer, input_ids, document, question, evidence)


def spelled(prompt: PromptText, span: slice) -> str:
    return "".join(prompt.texts[span])


class TestPromptText:
    @pytest.mark.parametrize("template", [None, TEMPLATE])
    def test_finds_document_question_and_special_tokens(self, template: str | None) -> None:
        tokenizer = planted.bytes_tokenizer(template)
        prompt = located(tokenizer, "Amber lies\nhere. What now?", "What now?")
        assert spelled(prompt, prompt.document).strip() == "Amber lies\nhere. What now?"
        assert spelled(prompt, prompt.question) == "What now?"
        marked = [text for text, special in zip(prompt.texts, prompt.special, strict=True) if special]
        assert marked == (["<begin>", "<end>"] if template else [])

    def test_marks_evidence_wherever_the_document_holds_it_and_not_in_the_question(self) -> None:
        document = "The key is 7391. Again: the key\n  is 7391."
        prompt = located(planted.bytes_tokenizer(TEMPLATE), document, "key is 7391?", "key is 7391", "Again")
        found = [spelled(prompt, span) for span in prompt.evidence]
        assert [" ".join(text.split()) for text in found] == ["key is 7391", "Again", "key is 7391"]
        assert all(span.stop <= prompt.question.start for span in prompt.evidence)

    def test_evidence_inside_multi_byte_text_takes_all_tokens_of_its_characters(self) -> None:
        prompt = located(planted.bytes_tokenizer(), "🐳鯨🐋 swam", "Who?", "鯨")
        (span,) = prompt.evidence
        assert prompt.texts[span] == ("鯨", "", "")
        assert span.start == 4  # after the four bytes of the whale

    def test_a_tokenizer_that_changes_white_space_still_finds_it(self) -> None:
        document = " ".join([*planted.haystack_sentences(4), planted.needle("amber")])
        prompt = located(planted.tokenizer(), document, "What of amber?", planted.needle("amber"))
        (span,) = prompt.evidence
        assert "".join(spelled(prompt, span).split()) == "".join(planted.needle("amber").split())

    def test_what_was_cut_away_is_not_found(self) -> None:
        tokenizer = planted.bytes_tokenizer()
        input_ids = tokenizer("some other text")["input_ids"]
        assert prompt_text(tokenizer, input_ids, "the document", "the question", ["document"]).evidence == ()

    def test_evidence_is_text_and_no_pattern(self) -> None:
        assert occurrences("a.c abc a.c", "a.c") == [(0, 3), (8, 11)]
        assert occurrences("anything", " \n") == []


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text inside each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script" and self.get_starttag_text().startswith("<script"):
            self.scripts.append(data)


def report(text: str) -> Report:
    prompt = PromptText((text, "🐳", ""), (False, False, True), slice(0, 2), slice(2, 3), (slice(0, 1),))
    retention = Retention((LayerRetention(3, 2, (2, 0, 1)),))
    return Report(text, text, text, 0, prompt, (Explanation(text, 0.5, retention, 200, 100, text),), text)


class TestPage:
    def test_a_document_cannot_add_an_element(self) -> None:
        harmless, hostile = Elements(retention_page(report("text"))), Elements(retention_page(report(HOSTILE)))
        assert [tag for tag, _ in hostile.found] == [tag for tag, _ in harmless.found]
        assert "img" not in [tag for tag, _ in hostile.found]

    def test_holds_the_data_unchanged(self) -> None:
        data = json.loads(Elements(retention_page(report(HOSTILE))).scripts[0])
        layer = data["methods"][0]["layers"][0]
        assert base64.b64decode(layer.pop("retained")) == bytes([2, 0, 1])
        assert data["methods"][0].pop("budget_text") == "50% of the prompt"
        wanted = report(HOSTILE).to_dict()
        del wanted["methods"][0]["layers"][0]["retained"]
        assert data == wanted

    def test_asks_for_nothing_else(self) -> None:
        page = retention_page(report("text"))
        assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp", page)
        policy = next(
            attrs["content"] for tag, attrs in Elements(page).found if "http-equiv" in attrs and tag == "meta"
        )
        assert policy is not None
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy


def test_looking_ahead_cannot_be_explained() -> None:
    method = SnapKV(lookahead=3)
    with pytest.raises(ConfigError, match="lookahead=3"):
        explain(tiny.tiny_model("llama"), planted.bytes_tokenizer(), tiny.random_tokens(20), method, 8)
