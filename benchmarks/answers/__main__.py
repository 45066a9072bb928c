"""`scripts/measure-answers`: what cuts of long answers lose against the full cache, and what of the time they take.

Losses are mean KL divergences from the full cache's distributions over a continuation: the model's own, sampled, or a
text. It is read a cut's interval at a time; the prompt is kept whole.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv import defaults
from compresskv.cache.timing import EvictionTimer
from compresskv.compression import Compressing
from compresskv.errors import CompressKVError
from compresskv.methods.base import Method
from compresskv.methods.prepare import prepare_method
from compresskv.methods.registry import create, parse_methods
from compresskv.models.decoding import decode_one_token
from compresskv.models.load import load
from compresskv.selection.cuts import DECODE_INTERVAL, DecodeBudget

METHODS = "streaming_llm,snapkv,rkv,triattention,rkv_ahead"
QUESTION = "Write a long and detailed story about a lighthouse keeper who finds a map. Give each of many people a name."
TEXT_PROMPT = 200
"""Tokens of a text that count as its prompt."""


def main() -> None:
    """Measure what is missing, then print the table."""
    options = _options()
    rows = [json.loads(line) for line in _lines(options.output)]
    for spec in options.models:
        name, _, profile = spec.partition("=")
        model, tokenizer = load(name)
        ids, num_prompt = continuation(model, tokenizer, options)
        full = None
        for label, method in parse_methods("--methods", options.methods).items():
            key = {"model": name, "text": str(options.text), "method": label, "tokens": options.tokens}
            key |= {"budget": options.budget, "interval": options.interval, "decoded": options.decode}
            if any(key.items() <= row.items() for row in rows):
                continue
            full = logits_of(model, ids) if full is None else full
            own = prepare_method(model, method, (profile or None) if method.needs_profile else None)
            decode = DecodeBudget(options.budget, options.interval)
            rows.append(key | measured(model, own, decode, ids, num_prompt, full, options.decode))
            _append(options.output, rows[-1])
            print(rows[-1], file=sys.stderr)
    _print([row for row in rows if row["text"] == str(options.text)])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/measure-answers", description=__doc__)
    parser.add_argument(
        "models", nargs="*", default=[defaults.MODEL], metavar="MODEL[=PROFILE]", help="default: the embedded model"
    )
    parser.add_argument("--methods", default=METHODS, help="of the cuts")
    parser.add_argument("--text", type=Path, help="a text file; without, the model's own answer")
    parser.add_argument("--tokens", type=int, default=2048, help="of the continuation")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--interval", type=int, default=DECODE_INTERVAL)
    parser.add_argument(
        "--decode", type=int, default=256, help="tokens read one by one then, for the share of the time"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("answers.jsonl"))
    return parser.parse_args()


@torch.no_grad()
def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> tuple[Tensor, int]:
    """(1, T) token ids, and how many of them are the prompt."""
    if options.text is not None:
        ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"]
        return ids[:, : TEXT_PROMPT + options.tokens], TEXT_PROMPT
    torch.manual_seed(0)
    messages = [{"role": "user", "content": QUESTION}]
    prompt: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([prompt])
    length = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
    sampled: Any = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.9, top_p=0.95, top_k=0, **length
    )
    return sampled, ids.shape[1]


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(T, vocab): the full cache's."""
    logits: Tensor = model(ids, use_cache=False).logits[0]
    return logits


@torch.no_grad()
def measured(
    model: PreTrainedModel,
    method: Method,
    decode: DecodeBudget,
    ids: Tensor,
    num_prompt: int,
    full: Tensor,
    num_decoded: int,
) -> dict[str, float]:
    """The mean KL in nats a token, behind the first budget and interval of new tokens, and what cuts cost then."""
    timer, losses = EvictionTimer(model.device), list[float]()
    whole = create("streaming_llm" if method.decides_together else "snapkv")
    given: Any = {"decode": decode, "decode_method": method, "observer": timer}
    with Compressing(model, whole, 1.0, **given) as cache:
        start = 0
        for end in [num_prompt, *range(num_prompt + decode.interval, ids.shape[1] + 1, decode.interval)]:
            logits = model(ids[:, start:end], past_key_values=cache, use_cache=True).logits[0]
            expected, found = (states.float().log_softmax(-1) for states in (full[start:end], logits))
            losses += (expected.exp() * (expected - found)).sum(-1).tolist()
            start = end
        before, began, token = timer.eviction.seconds, time.perf_counter(), 5
        for _ in range(num_decoded):
            token = int(decode_one_token(model, token, cache).argmax())
        seconds, evicting = time.perf_counter() - began, timer.eviction.seconds - before
        counted = losses[num_prompt + decode.budget + decode.interval :]
        return {
            "kl": sum(counted) / len(counted),
            "token_ms": 1e3 * seconds / max(1, num_decoded),
            "share_evicting": evicting / seconds if num_decoded else 0.0,
            "nbytes": cache.nbytes,
        }


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _print(rows: list[dict[str, Any]]) -> None:
    print("| model | method | KL | ms a token | of it eviction | KV cache, MB |")
    print("|---|---|---:|---:|---:|---:|")
    for row in rows:
        costs = f"{row['token_ms']:.1f} | {row['share_evicting']:.1%} | {row['nbytes'] / 1e6:.1f}"
        print(f"| {row['model']} | `{row['method']}` | {row['kl']:.3g} | {costs} |")


if __name__ == "__main__":
    try:
        main()
    except CompressKVError as error:
        sys.exit(f"scripts/measure-answers: {error}")
