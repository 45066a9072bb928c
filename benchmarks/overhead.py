"""What compression costs in prefill and saves in decode, beside plain transformers, in one run.

    python benchmarks/overhead.py [--tokens 4096] [--rounds 5] [--json]

Prefill: plain transformers (sdpa, DynamicCache) and each method take turns, so that a noisy machine treats all alike;
ratios are medians over rounds of the ratio within a round. Memory: each in a process of its own, the growth of the
process's peak during prefill. Decode: at the budget after the long prompt, beside plain transformers after a prompt of
`budget` tokens.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pydoc_data.topics import topics

import torch
from transformers import DynamicCache

import compresskv
from compresskv import memory
from compresskv.decoding import decode_one_token, prefill

METHODS = ("full", "streaming_llm", "snapkv", "pyramidkv", "compresskv")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model, tokenizer = compresskv.load(options.model)
    text = " ".join(topics[name] for name in sorted(topics))
    input_ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, : options.tokens]
    if options.peak_of:
        print(json.dumps(peak_growth(model, input_ids, options.peak_of, options.budget)))
        return
    methods = options.methods.split(",")
    rows = timings(model, input_ids, methods, options.budget, options.rounds)
    for name, row in rows.items():
        row["prefill_peak_mb"] = peak_in_child(name, options) / 1e6
    report(rows, options, model)


def context(model, name, budget):
    """A new cache: transformers' own for 'plain'."""
    if name == "plain":
        return nullcontext(DynamicCache(config=model.config))
    return compresskv.compressing(model, name, budget)


def timings(model, input_ids, methods, budget, rounds):
    """Prefill seconds and decode milliseconds of plain transformers and of each method, in turns."""
    names = ["plain", *methods]
    prefills, decodes = {name: [] for name in names}, {name: [] for name in [*names, "plain, short prompt"]}
    for turn in range(rounds + 1):
        for name in names if turn % 2 else reversed(names):
            seconds, per_token = once(model, input_ids, name, budget)
            if turn:  # the first round warms up
                prefills[name].append(seconds)
                decodes[name] += per_token
        if turn:
            decodes["plain, short prompt"] += once(model, input_ids[:, :budget], "plain", budget)[1]
    short = statistics.median(decodes["plain, short prompt"])
    rows = {}
    for name in names:
        ratios = [mine / plain for mine, plain in zip(prefills[name], prefills["plain"], strict=True)]
        decode_ms = 1000 * statistics.median(decodes[name])
        rows[name] = {
            "prefill_s": statistics.median(prefills[name]),
            "prefill_ratio": statistics.median(ratios),
            "decode_ms": decode_ms,
            "decode_ratio_to_short_prompt": decode_ms / (1000 * short),
        }
    return rows


def once(model, input_ids, name, budget, tokens=24):
    """(prefill seconds, seconds of each decode step)."""
    with context(model, name, budget) as cache:
        start = time.perf_counter()
        token = int(prefill(model, input_ids, cache).argmax())
        seconds = time.perf_counter() - start
        steps = []
        for _ in range(tokens):
            start = time.perf_counter()
            token = int(decode_one_token(model, token, cache).argmax())
            steps.append(time.perf_counter() - start)
    return seconds, steps


def peak_growth(model, input_ids, name, budget):
    """Bytes by which the peak grew while the prompt was read."""
    with context(model, name, budget) as cache:  # warm up: buffers that stay
        prefill(model, input_ids[:, :64], cache)
    memory.reset_peak(model.device)
    before = memory.peak_nbytes(model.device)
    with context(model, name, budget) as cache:
        prefill(model, input_ids, cache)
        return memory.peak_nbytes(model.device) - before


def peak_in_child(name, options):
    """`peak_growth` in a process of its own."""
    arguments = ["--peak-of", name, "--model", options.model, "--tokens", str(options.tokens)]
    command = [sys.executable, __file__, *arguments, "--budget", str(options.budget)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report(rows, options, model):
    """A table, or JSON."""
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{options.model}, {model.dtype}, {options.tokens} tokens, budget {options.budget}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    last = f"x plain at {options.budget}"
    print(f"{'':15}{'prefill s':>10}{'x plain':>9}{'peak MB':>9}{'decode ms':>11}{last:>16}")
    for name, row in rows.items():
        print(
            f"{name:15}{row['prefill_s']:10.2f}{row['prefill_ratio']:9.3f}{row['prefill_peak_mb']:9.0f}"
            f"{row['decode_ms']:11.1f}{row['decode_ratio_to_short_prompt']:16.2f}"
        )


if __name__ == "__main__":
    main()
