"""Large results lie in memory for which huge pages were asked, others don't."""

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


@pytest.mark.skipif(not MODE.exists() or "[madvise]" not in MODE.read_text(), reason="no huge pages on request here")
def test_the_kernel_is_asked() -> None:
    """From the first whole huge page on."""
    large = huge_pages.empty((huge_pages.LARGE // 4,), torch.float32)
    assert "hg" in flags_at(large.data_ptr() + large.nbytes // 2)
    large.fill_(1.0)
    assert large.sum() == large.numel()


def test_whole_huge_pages_inside_of_large_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: nobody else's memory is advised, and nothing of a small result."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(huge_pages.mmap, "MADV_HUGEPAGE", 14, raising=False)
    monkeypatch.setattr(huge_pages, "_advise", lambda: lambda start, n, advice: asked.append((start, n)))
    small = huge_pages.empty((huge_pages.LARGE // 4 - 1,), torch.float32)
    assert not asked, small.shape
    large = huge_pages.empty((huge_pages.LARGE // 4 + 1,), torch.float32)
    ((start, n),) = asked
    assert start % huge_pages.HUGE == n % huge_pages.HUGE == 0
    assert large.data_ptr() <= start < start + n <= large.data_ptr() + large.nbytes
    assert n > large.nbytes - 2 * huge_pages.HUGE


@pytest.mark.parametrize("known", [True, False])
def test_the_tensor_is_an_ordinary_one(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape, type and device as asked, also where there are no huge pages or another device is the default."""
    if not known:
        monkeypatch.setattr(huge_pages, "_advise", lambda: None)
    with torch.device("meta"):
        out = huge_pages.empty((3, huge_pages.LARGE), torch.bfloat16)
    assert out.shape == (3, huge_pages.LARGE)
    assert out.dtype == torch.bfloat16
    assert out.is_cpu
    assert out.is_contiguous()
    assert huge_pages.empty((0, 4), torch.float32).numel() == 0
