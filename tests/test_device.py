"""Which devices are let through, on a machine that has two GPUs, or none."""

from __future__ import annotations

import pytest
import torch

from halfbyte.device import check_device
from halfbyte.errors import UsageError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize("gpus", [2], indirect=True)
@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_a_device_that_is_there_is_let_through(gpus: None, device: str) -> None:
    check_device(device)


@pytest.mark.parametrize("gpus", [2], indirect=True)
@pytest.mark.parametrize("device", ["cuda:2", "cuda:7", "cuda:99999999999999999999"])
def test_a_gpu_that_is_not_there_is_refused_and_those_that_are_get_named(gpus: None, device: str) -> None:
    with pytest.raises(UsageError, match="there is no CUDA device") as caught:
        check_device(device)
    assert caught.value.where == f"--device {device}"
    assert caught.value.todo == "torch sees cuda:0, cuda:1"


@pytest.mark.parametrize("gpus", [0], indirect=True)
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_without_a_gpu_cuda_is_refused(gpus: None, device: str) -> None:
    with pytest.raises(UsageError, match="torch sees no CUDA device"):
        check_device(device)


@pytest.mark.parametrize("gpus", [2], indirect=True)
@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "cuda:-1", "cuda:01", "cuda:١", "CPU", "cpu:0", ""])
def test_what_torch_cannot_read_is_refused(gpus: None, device: str) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        check_device(device)
