"""Models of known geometries with random weights: for speed alone, their answers mean nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from compresskv.errors import ConfigError, ModelError, first_line
from compresskv.models.fingerprint import fingerprint
from compresskv.models.shape import compressible_layers, decoder_config, heads_of
from compresskv.profiles.layer_errors import l1_normalised
from compresskv.profiles.packing import packed
from compresskv.profiles.profile import Profile
from compresskv.selection.forecast import NUM_MORE
from compresskv.system import memory
from compresskv.system.check import check_known, check_least

_SHARE = 0.5
"""Of the memory that is available, for weights and caches; activations need the rest."""
_NUM_CACHES = 3
"""Full ones held at once: plain's, ours, and that of the prompt being read."""
_SEED = 0


@dataclass(frozen=True)
class Geometry:
    """A decoder's shape, in the words of transformers' configs."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    def config(self, num_layers: int, max_tokens: int) -> PretrainedConfig:
        """A config of so many layers, whose positions reach to `max_tokens`."""
        shape = {name: value for name, value in vars(self).items() if name != "model_type"}
        shape |= {"num_hidden_layers": num_layers, "max_position_embeddings": max_tokens}
        absent = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window"))
        return AutoConfig.for_model(self.model_type, **shape, **absent)


GEOMETRIES = {
    "tiny": Geometry("llama", 48, 96, 4, 6, 2, 8, 128, False),
    "smollm2-135m": Geometry("llama", 576, 1536, 30, 9, 3, 64, 49152, True),
    "qwen2.5-0.5b": Geometry("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "qwen3-0.6b": Geometry("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "llama-1b": Geometry("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3b": Geometry("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "mistral-7b": Geometry("mistral", 4096, 14336, 32, 32, 8, 128, 32768, False),
    "llama-8b": Geometry("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
}


def find_geometry(name: str) -> Geometry:
    """A geometry by name.

    Raises:
        ConfigError: unknown.
    """
    check_known("random", name, GEOMETRIES)
    return GEOMETRIES[name]


@dataclass(frozen=True)
class RandomModel:
    """A model with random weights, and what was changed to make it fit."""

    model: PreTrainedModel
    note: str
    """Empty, or one line that says how many layers it has instead of its geometry's own."""


def random_model(
    name: str, num_layers: int | None, max_tokens: int, dtype: torch.dtype, device: torch.device, *, whole: bool = False
) -> RandomModel:
    """Build one, with the same weights at every call: in eval mode, with sdpa attention.

    Args:
        num_layers: None is the geometry's own number, or as many as half of the available memory holds with caches.
        max_tokens: positions that it must have.
        whole: build all layers, or as many as asked for, whatever memory is left for caches.
    Raises:
        ConfigError: an unknown geometry, fewer layers than 1, or more than fit.
        ModelError: it cannot be built.
    """
    geometry = find_geometry(name)
    check_least("layers", num_layers)
    wanted = num_layers or geometry.num_hidden_layers
    most = wanted if whole else _layers_that_fit(geometry, max_tokens, dtype, device)
    if most < (1 if num_layers is None else wanted):
        problem = (
            f"with {wanted} layers and caches of {max_tokens} tokens does not fit into half of the available memory, "
            f"which holds {most}: choose shorter prompts, a smaller geometry or fewer layers"
        )
        raise ConfigError(problem, option="random", value=name)
    built = min(wanted, most)
    config = geometry.config(built, max_tokens)
    model = _build(config, dtype, device)
    model.config._name_or_path = f"random {name}"
    own = geometry.num_hidden_layers
    return RandomModel(model, "" if built == own else f"layers of random {name}: {built} instead of {own}")


def _build(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    maker: Any = AutoModelForCausalLM
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(cuda), device:
            torch.manual_seed(_SEED)
            model: Any = maker.from_config(config, dtype=dtype, attn_implementation="sdpa")
            return model.eval().requires_grad_(False)  # type: ignore[no-any-return]
    except (RuntimeError, MemoryError) as err:  # out of memory, of either kind
        raise ModelError(f"a random {config.model_type} cannot be built ({first_line(err)})") from err


def _layers_that_fit(geometry: Geometry, max_tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    available = memory.available_nbytes(device)
    if available is None:
        return geometry.num_hidden_layers
    one, two = (_num_parameters(geometry.config(count, 16)) * dtype.itemsize for count in (1, 2))
    token_nbytes = 2 * geometry.num_key_value_heads * geometry.head_dim * dtype.itemsize
    layer_nbytes = two - one + _NUM_CACHES * max_tokens * token_nbytes
    outside_nbytes = one - (two - one)  # embeddings
    return max(0, int((available * _SHARE - outside_nbytes) // layer_nbytes))


def _num_parameters(config: PretrainedConfig) -> int:
    maker: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model: Any = maker.from_config(config)
    return sum(weight.numel() for weight in model.parameters())


def random_profile(model: PreTrainedModel) -> Profile:
    """A valid profile with random head scores and layer errors: methods cost what they cost with a measured one."""
    own, layers = fingerprint(model), compressible_layers(model)
    generator = torch.Generator().manual_seed(_SEED)
    draw: Callable[..., torch.Tensor] = torch.rand
    scores = draw(len(layers), own.num_query_heads, generator=generator).tolist()
    errors = l1_normalised(draw(len(layers), generator=generator).tolist())
    return Profile(
        model_id=str(model.config._name_or_path),
        fingerprint=own,
        layer_indices=tuple(layers),
        semantic_scores=tuple(map(tuple, scores)),
        traditional_scores=None,
        num_runs=1,
        layer_errors_by_set={"random": errors},
        layer_errors=errors,
        provenance={"random": True},
        replay_weights=tuple(random_weights(model, layer_idx) for layer_idx in layers),
        query_centres=tuple(random_centres(model, layer_idx) for layer_idx in layers),
    )


def random_weights(model: PreTrainedModel, layer_idx: int) -> str:
    """A layer's weights as in `Profile.replay_weights`."""
    heads = heads_of(decoder_config(model), layer_idx)
    return _drawn(heads.num_kv_heads * (2 * heads.head_dim + NUM_MORE), layer_idx, 32)


def random_centres(model: PreTrainedModel, layer_idx: int) -> str:
    """Those of a layer's queries as in `Profile.query_centres`."""
    heads = heads_of(decoder_config(model), layer_idx)
    return _drawn(heads.num_query_heads * 2 * heads.head_dim, layer_idx, 16)


def _drawn(count: int, seed: int, num_bits: int) -> str:
    draw: Callable[..., torch.Tensor] = torch.randn
    return packed((0.3 * draw(count, generator=torch.Generator().manual_seed(seed), device="cpu")).tolist(), num_bits)
