"""The GPU's benchmark runs, on a CPU and a few tiny images."""

from collections import Counter

import pytest

from benchmarks import gpu
from benchmarks.harness import Row


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_every_variant_is_compared_with_plain_pytorch_and_with_the_bare_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reported: list[Row] = []
    monkeypatch.setattr(gpu, "report", lambda name, rows, packages: reported.extend(rows))
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu"])
    gpu.main()
    assert Counter(row.peer for row in reported) == {"plain PyTorch": 8, "bare step": 8}
    assert all(row.theirs > 0 and row.ours > 0 for row in reported)
    for variant in ("float32 resident", "float32 streamed", "bfloat16 streamed"):
        assert any(variant in row.what for row in reported)
