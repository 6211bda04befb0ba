"""Native code of fewbit (src/native/). Missing when the package was installed without a C++ compiler."""

def instruction_set() -> str:
    """The widest read loop that this CPU runs: `avx512`, `avx2` or `portable`."""

def read_bandwidth(bytes: int, threads: int, seconds: float = 1.0) -> float:
    """DRAM read bandwidth in 1e9 bytes per second.

    Args:
        bytes: size of the buffer; at least 512 MiB and several times the last-level cache for a figure that means something.
        threads: each reads its own contiguous part.
        seconds: how long to repeat the pass; the best one counts. Each prefetch distance gets one pass at least.

    Raises:
        ValueError: fewer than one thread, fewer than 2 MiB per thread, negative time.
        MemoryError: the buffer cannot be allocated.
    """
