"""What the simulated GPU refuses, as CUDA would. These run in a rehearsal only: make gpu-rehearsal."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from torch import Tensor, nn

import mlmfast
from mlmfast import backends
from mlmfast.ops.linear import linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("SIMULATED_GPU" not in os.environ, reason="about the simulated GPU, not a real one"),
]


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, device="cuda")


def test_host_and_device_do_not_meet() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        ones(3) + torch.ones(3)
    with pytest.raises(TypeError, match="cpu"):
        ones(3).numpy()
    assert (ones(3) + torch.tensor(2.0)).tolist() == [3, 3, 3]  # a single number may come from the host


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).all()),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: torch.zeros(3).to("cuda"),
        lambda x: torch.tensor([1, 2], device="cuda"),
        lambda x: torch.cuda.synchronize(),
    ],
    ids=["item", "cpu", "tolist", "nonzero", "mask", "bool", "copy_", "to", "tensor", "synchronize"],
)
def test_waits_are_seen(wait: object) -> None:
    assert callable(wait)
    x = ones(3)
    wait(x)  # as such there is nothing wrong with it
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            wait(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        wait(x)


def test_a_replay_reads_what_is_there_now() -> None:
    x, weight = ones(2, 8), ones(3, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = torch.zeros(2, 8, device="cuda").add_(x)
        found = linear(2 * sums, weight)[:1].clone()
    x.fill_(3)
    assert found.tolist() == [[16, 16, 16]]
    for _ in range(2):
        graph.replay()
        assert found.tolist() == [[48, 48, 48]]


def test_memory_is_counted_and_limited() -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    x = torch.empty(1000, device="cuda")
    view = x[10:]
    assert torch.cuda.memory_allocated() == before + 4000
    del x
    assert torch.cuda.memory_allocated() == before + 4000
    del view
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 4000) / whole)
    try:
        torch.empty(900, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2000, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_tied_weights_stay_one_tensor() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second).cuda()
    assert first.weight is second.weight and first.weight.is_cuda
    assert model.to("cpu")[0].weight.device.type == "cpu" and first.weight is second.weight


def test_kernels_of_the_device_serve() -> None:
    assert {service.backend for service in backends.report("cuda", torch.float32)} == {"triton"}
    assert mlmfast.load("tiny", device="cuda").score(["A cat sat."])[0].total < 0
