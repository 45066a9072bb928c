"""What a second reading of a text attends to: against the attention weights that the model itself gives out."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import compresskv
import planted
import tiny
from compresskv import CacheStateError, ConfigError, PromptError, make_plan
from compresskv.attention.routing import routing
from compresskv.cache.full import branch
from compresskv.calibration.needles import encode_request
from compresskv.methods import registry
from compresskv.methods.prepare import prepare_method
from compresskv.models.decoding import decode, prefill
from compresskv.models.shape import compressible_layers, heads_of
from compresskv.plans.capture import CapturedPrompt
from compresskv.plans.replay import LEAD_TOKENS, NUM_SINKS, replay
from oracle import evictions, oracle_logits

NUM_TOKENS = 60
IDS: list[int] = tiny.random_tokens(NUM_TOKENS)[0].tolist()


def naive_replay(model: PreTrainedModel, starts: list[int]) -> list[Tensor]:
    """(H_kv, T) for each full-attention layer, from the weights of eager attention over text, lead and chunk."""
    found = [
        torch.zeros(heads_of(model.config, layer).num_kv_heads, NUM_TOKENS) for layer in compressible_layers(model)
    ]
    for start, stop in pairwise([*starts, NUM_TOKENS]):
        again = IDS[max(0, start - LEAD_TOKENS) : stop]
        with torch.no_grad():
            output = model(torch.tensor([IDS + again]), output_attentions=True, past_key_values=DynamicCache())
        among = torch.zeros(NUM_TOKENS + len(again), dtype=torch.bool)
        among[: min(NUM_SINKS, start)] = among[start:stop] = among[NUM_TOKENS:] = True
        for layer, noted in zip(compressible_layers(model), found, strict=True):
            rows = output.attentions[layer][0, :, NUM_TOKENS:] * among
            rows = rows / rows.sum(dim=-1, keepdim=True)
            largest = rows.amax(dim=1).view(len(noted), -1, rows.shape[-1]).amax(dim=1)
            noted[:, start:stop] = largest[:, start:stop]
    return found


@pytest.mark.parametrize("chunk_tokens", [64])
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_noted_is_the_largest_weight_of_the_models_own_attention(
    family: str, attn_implementation: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compresskv.plans.replay._LEAST_CHUNK", 8)
    eager, model = tiny.tiny_model(family, "eager"), tiny.tiny_model(family, attn_implementation)
    for step in (chunk_tokens, 25):
        with routing(model):
            captured = CapturedPrompt(model, 1)
            captured.read(IDS)
            noted = replay(model, captured.cache, IDS, chunk_tokens=step)
            again = replay(model, captured.cache, IDS, chunk_tokens=step)
        expected = naive_replay(eager, list(range(0, NUM_TOKENS, step)))
        for own, wanted, second in zip(noted, expected, again, strict=True):
            torch.testing.assert_close(own[0], wanted, atol=1e-5, rtol=1e-4)
            assert torch.equal(own, second), "the cache stays as it was"


def test_near_the_last_position_that_the_model_knows_chunks_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build_model("llama")
    model.config.max_position_embeddings = NUM_TOKENS + LEAD_TOKENS + 20
    monkeypatch.setattr("compresskv.plans.replay._LEAST_CHUNK", 8)
    told: list[int] = []
    with routing(model):
        captured = CapturedPrompt(model, 1)
        captured.read(IDS)
        replay(model, captured.cache, IDS, on_chunk=lambda done, _: told.append(done))
        assert told == [20, 40, 60]
        told.clear()
        model.config.max_position_embeddings = NUM_TOKENS
        replay(model, captured.cache, IDS, on_chunk=lambda done, _: told.append(done))
    assert told == [8, 16, 24, 32, 40, 48, 56, 60]


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "biogpt"])
def test_positions_that_a_model_learned_are_not_left(model_type: str) -> None:
    model, tokenizer = _with_positions(model_type), tiny.tokenizer()
    fits = 512 - LEAD_TOKENS - 64
    plan = make_plan(model, tiny.random_tokens(fits)[0].tolist(), "kvzip", 9)
    assert plan.mean_retained == 9
    words, computed = tiny.random_words(fits), []
    calls = {
        "plan": lambda: make_plan(model, tiny.random_tokens(fits + 1)[0].tolist(), "kvzip", 9),
        "ask": lambda: compresskv.ask(model, tokenizer, words, "5 9", method="kvzip", budget=9, max_new_tokens=4),
    }
    with model.register_forward_pre_hook(lambda *_: computed.append(1)):
        for name, call in calls.items():
            with pytest.raises(
                PromptError, match="but the model has 512: shorten the text, or choose a method"
            ) as told:
                call()
            assert "\n" not in str(told.value), name
    assert not computed


def _with_positions(model_type: str) -> PreTrainedModel:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=24,
        word_embed_proj_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        intermediate_size=24,
        max_position_embeddings=512,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("budget", [1, 7, 0.4, [9, 30, 24, 70]], ids=str)
@pytest.mark.parametrize("method", tiny.REPLAYING_METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_plan_a_capture_and_an_answer_by_that_plan_agree(family: str, method: str, budget: float | list[int]) -> None:
    model, sequence = tiny.tiny_model(family), tiny.random_tokens(NUM_TOKENS + 3)
    layers = compressible_layers(model)
    budget = budget[: len(layers)] if isinstance(budget, list) else budget
    options = tiny.options_for(model, method)
    plan = make_plan(model, sequence[0, :NUM_TOKENS].tolist(), method, budget, **options)
    with routing(model):
        captured = CapturedPrompt(model, 1)
        captured.read(sequence[0, :NUM_TOKENS].tolist())
        cut = captured.compress(prepare_method(model, method, **options), budget)
    with compresskv.compressing(model, plan) as cache:
        tiny.read(model, cache, sequence, [NUM_TOKENS])
        assert [tiny.kept_tokens(layer) for layer in cache.compressed_layers] == [
            tiny.kept_tokens(layer) for layer in cut.compressed_layers
        ]
        assert cache.nbytes == cut.nbytes
        logits = tiny.read(model, cache, sequence, [3])
    wanted = oracle_logits(family, sequence, evictions(cut))[:, NUM_TOKENS:]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    mean = budget if isinstance(budget, int) else 24
    if not isinstance(budget, list):
        counts = tiny.kept_counts(cut)
        assert int(counts.sum()) == mean * counts.numel()


def test_every_question_is_answered_after_the_document_was_cut() -> None:
    """The planted heads look, from each word of a needle, for the next: so does a second reading, for all needles."""
    model, tokenizer = planted.model(), planted.tokenizer()
    sentences = planted.haystack_sentences(40)
    for place, topic in enumerate(planted.TOPICS):
        sentences.insert(6 * place + 2, planted.needle(topic))
    prompts = [
        encode_request(tokenizer, " ".join(sentences), f"What of {topic}?").input_ids for topic in planted.TOPICS
    ]
    num_shared = next(at for at, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1) - 2
    right = {}
    with routing(model):
        captured = CapturedPrompt(model, 8)
        captured.read(prompts[0][:num_shared])
        for method in ("kvzip", "snapkv"):
            cache = captured.compress(registry.create(method), 0.2)
            right[method] = 0
            for topic, prompt in zip(planted.TOPICS, prompts, strict=True):
                copied = branch(cache)
                first = int(prefill(model, torch.tensor([prompt[num_shared:]]), copied).argmax())
                answer = tokenizer.decode(decode(model, tokenizer, first, copied, 12), skip_special_tokens=True)
                right[method] += str(answer).split()[:6] == planted.needle(topic)[:-1].split()
    assert right["kvzip"] == len(planted.TOPICS)
    assert right["snapkv"] <= 1, "of the needle at the document's end"


def test_a_session_reads_twice_in_chunks_too() -> None:
    model, tokenizer = planted.model(), planted.tokenizer()
    sentences = planted.haystack_sentences(40)
    sentences[9:9] = [planted.needle("cedar")]
    for chunk in (None, 100):
        session = compresskv.read(model, tokenizer, " ".join(sentences), method="kvzip", budget=0.15, chunk=chunk)
        answer = session.ask("What of cedar?", max_new_tokens=12, compile="never")
        assert answer.answer == planted.needle("cedar")[:-1]
        assert session.facts.kv_nbytes < 0.16 * session.facts.kv_nbytes_full


def test_compressing_does_not_know_the_tokens_and_says_where_they_are_known() -> None:
    model = tiny.tiny_model("llama")
    with pytest.raises(ConfigError, match=r"'kvzip' reads the prompt twice.*make_plan"):
        compresskv.compressing(model, "kvzip", 9)
    with pytest.raises(ConfigError, match=r"lookahead.*read twice"):
        registry.create("kvzip", lookahead=2)


def test_a_capture_with_too_few_queries_is_refused() -> None:
    model = tiny.tiny_model("llama")
    with routing(model):
        captured = CapturedPrompt(model, 8)
        captured.read(IDS)
        with pytest.raises(CacheStateError, match="'compactor' needs the queries of the whole prompt, not 8"):
            captured.compress(registry.create("compactor"), 9)
