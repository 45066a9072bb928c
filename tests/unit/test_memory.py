"""Peak memory of the process. The CUDA counters are PyTorch's own."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

import compresskv
import planted
import tiny
from compresskv.system.memory import peak_nbytes, reset_peak

CPU = torch.device("cpu")
NBYTES = 100_000_000


def _touch() -> None:
    """Fill 100 MB of the system's and give them back; PyTorch might take what other tests have left to this process."""
    with mmap.mmap(-1, NBYTES) as pages:
        for start in range(0, NBYTES, mmap.PAGESIZE):
            pages[start] = 1


def _resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE


def _resettable() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


@pytest.mark.skipif(sys.platform != "linux" or not _resettable(), reason="this system cannot reset the peak")
def test_the_peak_is_that_since_the_reset() -> None:
    _touch()
    reset_peak(CPU)
    before = peak_nbytes(CPU)
    assert peak_nbytes(CPU) - before < NBYTES // 10  # what was freed before the reset is forgotten
    held = _resident_nbytes()  # the system may have taken idle pages since the reset
    _touch()
    after = peak_nbytes(CPU)
    assert held + NBYTES * 0.985 < after < max(before, held) + NBYTES * 1.5  # freed again, and yet seen
    reset_peak(CPU)
    assert peak_nbytes(CPU) < after - NBYTES * 0.8


@pytest.mark.skipif(sys.platform != "linux" or not _resettable(), reason="this system cannot reset the peak")
def test_asking_leaves_the_callers_measurement_alone() -> None:
    model, tokenizer = tiny.build_model("llama"), planted.bytes_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    _touch()
    before = peak_nbytes(CPU)
    stats = compresskv.ask(model, tokenizer, "one two", "three?", method="snapkv", budget=40, max_new_tokens=1).stats
    assert stats.peak_memory_nbytes >= before


def test_without_proc_the_peak_is_of_the_whole_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS counts in bytes, others in KiB: the right unit lies within the machine's plausible range."""
    resource = pytest.importorskip("resource")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for platform, unit in (("darwin", 1), ("freebsd14", 1024)):
        monkeypatch.setattr(sys, "platform", platform)
        reset_peak(CPU)
        assert own * unit <= peak_nbytes(CPU) <= own * unit * 1.1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_container_that_forbids_the_reset_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path, *args: object, **kwargs: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", forbidden)
    reset_peak(CPU)
    assert peak_nbytes(CPU) > 0
