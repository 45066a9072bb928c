"""The C++ that compiled steps read packed entries with computes what PyTorch does."""

import ctypes
import mmap
import platform
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler

from compresskv.cache.stores.packed_states import PackedStates
from compresskv.cache.stores.packed_vectors import rotation
from compresskv.compiled.packed_attention import SOURCES, _tensors, definition, is_compiled_here, packed_attention
from compresskv.models.shape import Heads
from compresskv.selection.precision import PRECISIONS

SHAPES = [(4, 4, 64, 3), (8, 4, 80, 11), (4, 4, 8, 1), (8, 8, 12, 2), (2, 2, 64, 3), (2, 2, 80, 2), (2, 2, 256, 4)]
"""Bits of keys and of values, D, and query heads of a KV head: of several widths of vectors."""
_TENSORS = [argument.name for argument in _tensors()][:-1]
_RUN = """
extern "C" bool run(int64_t a, int64_t b, int64_t c, int64_t d, const compresskv::Inputs* in, float* out, int threads) {
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    const bool is_known = compresskv::attend_any(a, b, c, d, *in, out);
    omp_set_num_threads(before);
    return is_known;
}
"""


class Inputs(ctypes.Structure):
    """As in C++."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_vectors", "tail_room", "tail_count")),
        ("scaling", ctypes.c_float),
    ]


def without_avx512() -> list[str]:
    return ["-mno-avx512f"] if platform.machine() in ("x86_64", "AMD64") else []


@pytest.fixture(scope="module", params=["whole", "narrow"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With vectors as wide as the processor has them, and with narrower ones."""
    folder = tmp_path_factory.mktemp("library")
    cases = " ".join(f"CASE({', '.join(map(str, shape))})" for shape in SHAPES)
    computing, _ = "\n".join(one.read_text() for one in SOURCES).split("// What PyTorch's compiler calls")
    (folder / "own.cpp").write_text(f"#define SHAPES(CASE) {cases}\n{computing}\n{_RUN}")
    options = ["-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared", "-w"]
    options += without_avx512() if request.param == "narrow" else []
    subprocess.run([get_cpp_compiler(), *options, "own.cpp", "-o", "own.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "own.so"))
    library.run.restype = ctypes.c_bool
    return library


def arguments(shape: tuple[int, int, int, int], counts: list[int], num_new: int, room: int) -> list[Any]:
    """Of `packed_attention`; large scores, so that what is rescaled counts."""
    key_bits, value_bits, dim, groups = shape
    generator = torch.Generator().manual_seed(sum(counts) + dim)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    sides = []
    for bits in (key_bits, value_bits):
        whole = PackedStates.of([random(1, count + 1, dim) for count in counts], None, bits, are_keys=not sides)
        sides.append(whole.gathered([torch.arange(count)[None] for count in counts]))  # a head may have nothing
    keys, values = sides
    return [
        6 * random(1, len(counts) * groups, 1, dim),
        *(keys.vectors.codes, keys.vectors.ranges, keys.centre, keys.scale),
        *(values.vectors.codes, values.vectors.ranges, values.centre),
        rotation(dim, torch.device("cpu")),
        *(random(1, len(counts), num_new + room, dim) for _ in range(2)),
        torch.tensor([0, *counts]).cumsum(0),
        torch.tensor([num_new - 1]),
        dim**-0.5,
    ]


class Fenced:
    """A copy of a tensor, behind whose last byte lies a page that nobody may read."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        num_pages = -(-tensor.nbytes // mmap.PAGESIZE)
        self._memory = mmap.mmap(-1, (num_pages + 1) * mmap.PAGESIZE)
        fence = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + num_pages * mmap.PAGESIZE
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, 0) == 0
        self.place = fence - tensor.nbytes
        ctypes.memmove(self.place, tensor.data_ptr(), tensor.nbytes)


def computed(library: Any, shape: tuple[int, int, int, int], given: list[Any], threads: int) -> Tensor:
    *tensors, tail_end, scaling = given
    query, key_codes, tail_keys = tensors[0], tensors[1], tensors[9]
    numbers = (tail_keys.shape[1], key_codes.shape[1], tail_keys.shape[2], int(tail_end) + 1)
    output = torch.empty(1, 1, query.shape[1], query.shape[3])
    copies = [None if one is None else Fenced(one) for one in tensors]
    inputs = Inputs(*(None if one is None else one.place for one in copies), *numbers, scaling)
    assert library.run(*shape, ctypes.byref(inputs), ctypes.c_void_p(output.data_ptr()), threads)
    return output


@pytest.mark.parametrize("counts", [[5, 5], [128, 257, 1], [300], [0, 7], [700, 20, 900]])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_what_pytorch_does(library: Any, shape: tuple[int, int, int, int], counts: list[int]) -> None:
    for num_new, room, threads in ((1, 0, 1), (20, 3, 1), (20, 0, 3)):
        given = arguments(shape, counts, num_new, room)
        found = computed(library, shape, given, threads)
        torch.testing.assert_close(found, packed_attention(*given), rtol=1e-4, atol=1e-4)


def test_a_shape_that_was_not_compiled_is_refused(library: Any) -> None:
    assert not library.run(4, 4, 64, 5, None, None, 1)


def test_each_shape_is_compiled_once() -> None:
    layers = [(Heads(9, 3, 64), PRECISIONS["int4"])] * 2 + [(Heads(4, 1, 256), PRECISIONS["int4k8"])]
    text = definition(layers)
    assert "SHAPES(CASE) CASE(4, 4, 64, 3) CASE(8, 4, 256, 4)\n" in text
    assert text.count("{") == text.count("}")


def test_rows_of_broken_words_are_left_to_pytorch() -> None:
    assert is_compiled_here(Heads(4, 4, 12), PRECISIONS["int8"])
    assert not is_compiled_here(Heads(4, 4, 12), PRECISIONS["int4"])
    assert not is_compiled_here(Heads(4, 4, 6), PRECISIONS["int8"])


def test_the_sources_are_part_of_what_names_a_package() -> None:
    assert set(SOURCES) <= set(SOURCES[0].parent.glob("*.[pc]*"))
