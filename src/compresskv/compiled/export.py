"""Making machine code of a decode step by PyTorch's compiler."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.attention.routing import routing
from compresskv.cache.stores.base import RAGGED
from compresskv.compiled.narrow import narrow_weights
from compresskv.compiled.packed import example_packed
from compresskv.compiled.packed_attention import definition, is_compiled_here
from compresskv.compiled.step import Step, StepInputs, is_ragged, precision_of
from compresskv.models.shape import compressible_layers, decoder_config, heads_of


def find_compiler() -> None:
    """Fail for want of a C++ compiler at once, not after a minute's work on what it is to be given."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    get_cpp_compiler()


def export_step(model: PreTrainedModel, kinds: tuple[str, ...], program: Path, constants: Path) -> None:
    """Compile the step of a model whose layers are of these kinds.

    Args:
        program, constants: the files to write: machine code, and tensors that it needs beside the model's own.
    """
    if "distutils" in sys.modules and "setuptools" not in sys.modules:
        # setuptools, which the compiler imports, wants to replace Python's distutils, and fails where it was imported
        os.environ.setdefault("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    from compresskv.compiled.matvec import OneRowProducts, whole_loads  # PyTorch's compiler takes seconds to import

    example = example_inputs(model, kinds)
    by_tokens = [{1 if keys.ndim == 3 else 2: torch.export.Dim.DYNAMIC} for keys in example.keys]
    by_packed = [[_by_tokens(tensor) for tensor in own] for own in example.packed]
    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,  # weights would be stored once more
        "post_grad_custom_pre_pass": OneRowProducts(),
        "aot_inductor.custom_ops_to_c_shims": _own_operations(model, kinds),
    }
    with routing(model), torch.no_grad(), whole_loads(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about its own changes
        exported = torch.export.export(
            Step(model, kinds, narrow_weights(model).copies(model)),
            example.as_args(),
            dynamic_shapes=(None, None, None, None, by_tokens, by_tokens, by_packed),
            strict=False,  # plain Python runs, with tensors that note what is done to them
        )
        torch.save(_constants(exported.constants), constants)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(program), inductor_configs=options)


def _own_operations(model: PreTrainedModel, kinds: tuple[str, ...]) -> dict[Any, list[str]]:
    """C++ of the operations that are not PyTorch's."""
    config = decoder_config(model)
    layers = [(heads_of(config, layer_idx), precision_of(kind)) for layer_idx, kind in enumerate(kinds)]
    packed = [own for own in layers if own[1].is_packed and is_compiled_here(*own)]
    return {torch.ops.compresskv.packed_attention.default: [definition(packed)]} if packed else {}


def _constants(exported: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that a program needs, by the names that it may ask for them by.

    Those that code made rather than a module holds, such as rotations, are numbered anew by the compiler, in order.
    """
    own = {name: value for name, value in exported.items() if isinstance(value, Tensor)}
    made = [value for name, value in own.items() if "lifted_tensor" in name]
    return own | {f"_tensor_constant{number}": value for number, value in enumerate(made)}


def example_inputs(model: PreTrainedModel, kinds: tuple[str, ...], seed: int = 0) -> StepInputs:
    """Small random inputs of different lengths, so that no two are taken to be equal."""
    config, device = decoder_config(model), model.device
    generator = torch.Generator().manual_seed(seed)
    held: tuple[list[Tensor], list[Tensor]] = [], []
    packed: list[list[Tensor]] = []
    for layer_idx, kind in enumerate(kinds):
        heads = heads_of(config, layer_idx)
        num_tokens = 2 * heads.num_kv_heads + 3 * layer_idx
        shape: tuple[int, ...] = (1, num_tokens, heads.head_dim)
        if kind != RAGGED:
            shape = (1, heads.num_kv_heads, *shape[1:])
        for states in held:
            # small, as real ones are beside the hidden state: large ones would magnify what rounding does
            states.append(
                (0.1 * torch.randn(shape, generator=generator, device=generator.device)).to(device, model.dtype)
            )
        precision = precision_of(kind)
        packed.append(
            [
                one.to(device)
                for one in example_packed(precision, heads, num_tokens + 1, generator, ragged=is_ragged(kind))
            ]
            if precision.is_packed
            else []
        )
    num_heads = heads_of(config, compressible_layers(model)[0]).num_kv_heads
    starts = 2 * torch.arange(num_heads, device=device).expand(len(kinds), -1)
    token, position = (torch.full((1, 1), value, device=device) for value in (3, 1000))  # never one tensor for both
    return StepInputs(token, position, starts.clone(), starts + 1, *held, packed)


def _by_tokens(tensor: Tensor) -> dict[int, Any] | None:
    """Which dimension of what is packed grows with tokens: those of codes and ranges."""
    grows = tensor.dtype == torch.uint8 or tensor.shape[-1] == 2
    return {1: torch.export.Dim.DYNAMIC} if grows else None
