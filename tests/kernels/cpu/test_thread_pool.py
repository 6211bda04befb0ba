"""The kernels' threads: idle ones cost nothing, a forked child gets its own, callers from several threads wait for each other."""

from __future__ import annotations

import os
import threading
import time

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
