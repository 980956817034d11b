"""The helpers behind the kernels: whoever shows up, every task is done once and no bit changes."""

from __future__ import annotations

import threading
import time

import torch
from torch import Tensor

from srt.layers.cpu.kernels import Kernels
from srt.layers.cpu.linear import CpuLinear
from tests.layers.cpu.support import random


def test_helpers_that_fell_asleep_wake_for_the_next_call(kernels: Kernels) -> None:
    linear, x = CpuLinear(kernels), random(64, 256)
    packed = linear.pack(random(512, 256))
    expected = linear.matmul(x, packed)
    for pause_ms in (0, 0, 1, 5, 0, 2):
        time.sleep(pause_ms / 1000)
        assert torch.equal(linear.matmul(x, packed), expected)


def test_threads_that_call_at_the_same_time_get_their_own_results(kernels: Kernels) -> None:
    linear = CpuLinear(kernels)
    packed = linear.pack(random(512, 256))
    inputs = [random(64, 256) for _ in range(4)]
    expected = [linear.matmul(x, packed) for x in inputs]
    wrong: list[Tensor] = []

    def call(number: int) -> None:
        results = [linear.matmul(inputs[number], packed) for _ in range(50)]
        wrong.extend(result for result in results if not torch.equal(result, expected[number]))

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_more_helpers_than_cores_change_nothing(kernels: Kernels) -> None:
    linear, x = CpuLinear(kernels), random(300, 256)
    packed = linear.pack(random(512, 256))
    expected = linear.matmul(x, packed)
    kernels["srt_set_threads"](7)
    results = [linear.matmul(x, packed) for _ in range(20)]
    kernels["srt_set_threads"](2)
    assert all(torch.equal(result, expected) for result in results)
