"""Large results lie in memory for which huge pages were asked."""

from pathlib import Path

import pytest
import torch

from graft.kernels import huge_pages

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> set[str]:
    """The kernel's flags of the mapping that holds an address; `hg` is: huge pages advised."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return set(rest.split())
    return set()


@pytest.mark.skipif(
    not MODE.exists() or "[madvise]" not in MODE.read_text(), reason="huge pages aren't given on request here"
)
def test_large_results_get_huge_pages() -> None:
    """Large: advised from the first huge page on. Small: left alone."""
    large = huge_pages.empty((huge_pages.LARGE // 4,), torch.float32)
    assert "hg" in flags_at(large.data_ptr() + large.nbytes // 2)
    large.fill_(1.0)
    assert large.sum() == large.numel()


def test_the_tensor_is_an_ordinary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape and type as asked, also where no huge pages exist."""
    for known in (True, False):
        if not known:
            monkeypatch.setattr(huge_pages, "_advise", lambda: None)
        out = huge_pages.empty((3, huge_pages.LARGE), torch.bfloat16)
        assert out.shape == (3, huge_pages.LARGE)
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous()
    assert huge_pages.empty((0, 4), torch.float32).numel() == 0
