"""Models and tokenizers out of GGUF files."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskv.errors import ModelError, first_line
from compresskv.system.quiet import hush_torchao, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_one_at_a_time = threading.Lock()
"""Held while modules of the libraries are changed, so that nobody takes another's change for how they were."""


def load_gguf(
    path: Path, dtype: torch.dtype | None = None, *, spec: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GGUF file's model on the CPU, its weights de-quantised, and its tokenizer.

    Args:
        path: the file.
        dtype: of the weights; `None` is bfloat16.
        spec: what the user named; errors name it.
    Raises:
        ModelError: the file is damaged, or holds something that transformers cannot load.
    """
    import torch

    hush_torchao()
    import transformers

    loader: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": dtype or torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with _one_at_a_time, quiet(), _no_tensor_bar(), _read_once(path):
            tokenizer = _tokenizer(path)
            model, report = loader.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, output_loading_info=True, **options
            )
    except Exception as err:  # a damaged file surfaces as almost any exception of its readers
        problem = f": this GGUF file cannot be loaded ({first_line(err)}); if it is damaged, fetch it again"
        raise ModelError(problem, option="model", value=spec) from err
    check_weights(spec, report)
    return model, tokenizer


def check_weights(spec: str, report: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks tensors.

    Raises:
        ModelError: naming one of them.
    """
    missing = report["missing_keys"]
    if missing:  # transformers fills them with random numbers and goes on
        problem = f": its weights lack {len(missing)} tensors, such as {min(missing)}; fetch it again"
        raise ModelError(problem, option="model", value=spec)


@contextlib.contextmanager
def _no_tensor_bar() -> Iterator[None]:
    """Hide the bar that transformers' GGUF reader draws with tqdm itself, past the settings that `quiet` changes."""
    module = "transformers.modeling_gguf_pytorch_utils"  # newer releases read some architectures without it
    reader: Any = importlib.import_module(module) if importlib.util.find_spec(module) else None
    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader.tqdm = bar


@contextlib.contextmanager
def _read_once(path: Path) -> Iterator[None]:
    """Share one reader of a file: transformers makes one each for config, tokenizer and weights, and each goes through
    the whole vocabulary in Python.
    """
    import gguf

    made = gguf.GGUFReader
    reader = made(str(path))
    replaced: Any = gguf  # a class by a function, which a type checker would refuse
    replaced.GGUFReader = lambda place, *args: reader if path.samefile(place) else made(place, *args)
    try:
        yield
    finally:
        replaced.GGUFReader = made


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file describes, its special tokens as the file says.

    transformers' own reading is wrong in ways that depend on its version: other end and padding tokens, a
    prefix that the model never saw and, for SmolLM, digits that are not split off from what stands before them.
    """
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    fields = GGUFReader(str(path)).fields
    kind = _values(fields, "tokenizer.ggml.model") + _values(fields, "tokenizer.ggml.pre")
    tokenizer: PreTrainedTokenizerBase
    if kind == ["gpt2", "smollm"]:
        tokenizer = _smollm_tokenizer(fields)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    tokens = _values(fields, "tokenizer.ggml.tokens")
    for theirs, ours in {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}.items():
        for token_id in _values(fields, f"tokenizer.ggml.{theirs}_token_id"):
            setattr(tokenizer, f"{ours}_token", tokens[token_id])
    return tokenizer


def _smollm_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Byte-level BPE with single digits, GGUF's "smollm"; nothing is added around a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = _values(fields, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _values(fields, "tokenizer.ggml.merges")]
    backend = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    types = _values(fields, "tokenizer.ggml.token_type")
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == control]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = make(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=_values(fields, "llama.context_length")[0],
    )
    for template in _values(fields, "tokenizer.chat_template"):
        tokenizer.chat_template = template
    return tokenizer


def _values(fields: dict[str, Any], key: str) -> list[Any]:
    """A metadata field's strings or numbers; a scalar is a list of one, a missing field an empty list."""
    from gguf import GGUFValueType

    if key not in fields:
        return []
    field = fields[key]
    parts = [field.parts[index] for index in field.data]
    if field.types[-1] == GGUFValueType.STRING:
        return [bytes(part).decode("utf-8") for part in parts]
    return [part[0].item() for part in parts]
