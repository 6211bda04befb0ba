import importlib

import pytest

native = pytest.importorskip("fewbit._native")


@pytest.mark.parametrize("huge_pages", [True, False])
def test_every_loop_reads_the_buffer(huge_pages):
    buffer = native.ReadBuffer((64 << 20) + 12345, 2, huge_pages)
    assert buffer.bytes == 64 << 20
    loops = native.read_loops()
    assert (0, 1) in loops and len(set(loops)) == len(loops)
    for distance, streams in loops:
        assert 1e-5 < buffer.read(distance, streams) < 60


def test_bad_sizes_threads_and_loops_are_refused() -> None:
    for size, threads in ((1 << 20, 1), (64 << 20, 0), (4 << 20, 4)):
        with pytest.raises(ValueError):
            native.ReadBuffer(size, threads)
    with pytest.raises(ValueError, match="streams"):
        native.ReadBuffer(4 << 20, 1).read(0, 3)
    assert importlib.import_module("fewbit._native").read_bandwidth(4 << 20, 1, 0.0) > 0
