"""The kernels' threads: idle ones cost nothing, torch's and ours do not keep each other's cores busy, a forked child gets its own, and
callers from several threads wait for each other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fewbit import _native
from fewbit.formats.spec import SCHEMES
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.cpu.int_activations import CpuIntActivations
from fewbit.methods.rtn import rtn


@pytest.fixture
def linear():
    spec = SCHEMES["W4A16"].weights
    request = KernelRequest(spec, None, 128, 256, dtype=torch.float32, compute="int8-activations")
    kernel = CpuIntActivations(4)
    packed = kernel.pack(rtn(torch.randn(128, 256), spec), request)
    before = _native.threads()
    _native.set_threads(3)
    yield kernel.native(packed, request)
    _native.set_threads(before)


def run(linear: _native.Linear, x: torch.Tensor) -> torch.Tensor:
    y = torch.full((x.shape[0], 128), float("nan"))
    linear.apply(x, y)
    return y


def test_idle_threads_sleep(linear):
    x = torch.randn(1, 256)
    run(linear, x)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.03


TASKS = Path("/proc/self/task")


def seconds_of(threads: set[str]) -> float:
    """Processor time that threads of this process have had."""
    return sum(int((TASKS / thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def busy_seconds(work: Callable[[], object], threads: set[str]) -> float:
    """What `threads` take while `work` runs over and over for a quarter of a second on this one, their last spins let pass."""
    work()
    time.sleep(0.05)
    before, end = seconds_of(threads), time.monotonic() + 0.25
    while time.monotonic() < end:
        work()
    return seconds_of(threads) - before


@pytest.mark.skipif(not (TASKS / str(os.getpid()) / "schedstat").exists(), reason="this system does not tell the time of single threads")
def test_torch_and_the_kernels_do_not_keep_each_others_threads_busy(linear):
    """As many threads each as torch was told; those of the one sleep while the other computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    known = {task.name for task in TASKS.iterdir()}
    a, x = torch.randn(512, 512), torch.randn(64, 256)
    try:
        _native.set_threads(4)
        ours = {task.name for task in TASKS.iterdir()} - known
        assert len(ours) == 3  # and the caller
        assert busy_seconds(lambda: a @ a, ours) < 0.05
        others = {task.name for task in TASKS.iterdir()} - ours - {str(threading.get_native_id())}
        assert busy_seconds(lambda: run(linear, x), others) < 0.05
        assert busy_seconds(lambda: run(linear, x), ours) > 0.0  # else nothing of this would have been measured
    finally:
        torch.set_num_threads(before)


def test_many_short_runs(linear):
    x = torch.randn(2, 256)
    expected = run(linear, x)
    for _ in range(2000):
        assert torch.equal(run(linear, x), expected)


def test_callers_on_several_threads(linear):
    inputs = [torch.randn(n + 1, 256) for n in range(4)]
    expected = [run(linear, x) for x in inputs]
    wrong = []

    def work(n: int) -> None:
        for _ in range(100):
            if not torch.equal(run(linear, inputs[n]), expected[n]):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(linear):
    x = torch.randn(2, 256)
    expected = run(linear, x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(run(linear, x), expected) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_linear_keeps_its_weight_alive():
    spec = SCHEMES["W4A16"].weights
    request = KernelRequest(spec, None, 128, 256, dtype=torch.float32, compute="int8-activations")
    kernel = CpuIntActivations(4)
    packed = kernel.pack(rtn(torch.randn(128, 256), spec), request)
    linear, x = kernel.native(packed, request), torch.randn(2, 256)
    expected = run(linear, x)
    packed.clear()
    others = [torch.zeros(128 * 128, dtype=torch.uint8) for _ in range(50)]
    assert torch.equal(run(linear, x), expected) and len(others) == 50
