"""Layers on several devices: what is kept is what would be kept on one."""

import pytest
import torch
from torch import Tensor

import tiny
from compresskv.cache.cache import CompressedCache
from compresskv.cache.window import QueryWindow
from compresskv.compiled.compilable import NotCompilableError
from compresskv.compiled.decoding import CompiledDecoding
from compresskv.explain.attended import Attended
from compresskv.methods.prepare import prepare_method
from compresskv.models.place import devices_of
from compresskv.models.shape import compressible_layers
from devices import FIRST, SECOND, StandInDevices, inner, place

NUM_PROMPT, NUM_LAYERS = 70, 4

pytestmark = pytest.mark.skipif(tiny.DEVICE.type != "cpu", reason="stands in for other devices on a CPU")


def test_the_stand_in_devices_are_as_strict_as_real_ones() -> None:
    with StandInDevices():
        one, other = place(torch.ones(3), FIRST), place(torch.ones(3), SECOND)
        assert torch.arange(3, device=one.device).device == FIRST
        for wrong in (lambda: one + other, lambda: torch.stack([one, other]), lambda: one + torch.ones(3)):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        assert (one + other.to(FIRST)).device == FIRST
        with pytest.raises(TypeError, match="no float64"):
            one.double()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
def test_layers_on_two_devices_keep_what_layers_on_one_keep(method: str, padded: bool) -> None:
    model, generator = tiny.tiny_model("llama"), torch.Generator().manual_seed(2)
    assert len(compressible_layers(model)) == NUM_LAYERS
    chosen = prepare_method(model, method, **tiny.options_for(model, method))
    shapes = [(2, 2, NUM_PROMPT, 8), (2, 2, NUM_PROMPT, 8), (2, 6, NUM_PROMPT, 8)]
    states = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(NUM_LAYERS)]
    valid = (torch.arange(NUM_PROMPT) >= torch.tensor([[0], [25]])) if padded else None

    def kept(devices: list[torch.device]) -> list[Tensor]:
        cache = CompressedCache(model, chosen, 24)
        for layer, (keys, values, queries), device in zip(cache.compressed_layers, states, devices, strict=True):
            layer.adopt_prompt(place(keys, device), place(values, device))
            own = None if valid is None else place(valid, device)
            window = queries[:, :, max(0, NUM_PROMPT - chosen.num_observed()) :]
            layer.observe(QueryWindow(place(window, device), scaling=0.3), own)
        for layer, device in zip(cache.compressed_layers, devices, strict=True):
            assert layer.positions is not None
            assert {tensor.device for tensor in (layer.positions, *layer.tensors)} == {device}
        return [inner(layer.positions) for layer in cache.compressed_layers if layer.positions is not None]

    with StandInDevices():
        expected, found = kept([FIRST] * NUM_LAYERS), kept([FIRST, FIRST, SECOND, SECOND])
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_attention_of_an_answer_is_added_up_on_the_cpu() -> None:
    model, generator = tiny.tiny_model("llama"), torch.Generator().manual_seed(2)
    snapkv = prepare_method(model, "snapkv")
    layer = CompressedCache(model, snapkv, 24).compressed_layers[0]
    shapes = [(1, 2, NUM_PROMPT, 8), (1, 2, NUM_PROMPT, 8), (1, 6, NUM_PROMPT, 8)]
    keys, values, queries = (torch.randn(shape, generator=generator) for shape in shapes)
    with StandInDevices():
        layer.adopt_prompt(place(keys, FIRST), place(values, FIRST))
        layer.observe(QueryWindow(place(queries[:, :, -snapkv.window_size :], FIRST), scaling=0.3), None)
        attended = Attended(NUM_PROMPT)
        attended(layer, place(queries[:, :, -1:], FIRST))
    assert sum(attended.shares) == pytest.approx(1)


def test_a_model_on_two_devices_is_decoded_without_a_compiled_step() -> None:
    model = tiny.build_model("llama")
    weight = model.model.layers[3].mlp.up_proj.weight
    model.model.layers[3].mlp.up_proj.weight = torch.nn.Parameter(place(weight.detach(), SECOND), requires_grad=False)
    assert len(devices_of(model)) == 2  # whose work times are waited for
    cache = CompressedCache(model, prepare_method(model, "snapkv"), 24)
    with pytest.raises(NotCompilableError, match="several devices"):
        CompiledDecoding(model, cache, "always")._get_program(("even",) * NUM_LAYERS)
