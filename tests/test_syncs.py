"""Host code that waits for the device is seen where nothing waits."""

from __future__ import annotations

import pytest
import torch

from m3check.kernels.syncs import Watch


def test_waits_are_seen_through_what_is_computed_from_the_device():
    device, host = torch.arange(4), torch.arange(4)
    with Watch([device], [host]) as watch:
        host[0].item()
        (host + 1).tolist()
        scratch = torch.empty(2, dtype=device.dtype)
        scratch.copy_(device[:2])
    assert watch.found == []
    with Watch([device], [host]) as watch:
        (device + 1)[0].item()
        scratch[device[:2] > 0]
        host.copy_(device)
        device.tolist()
    assert [place.split()[0] for place in watch.found] == ["item", "__getitem__", "copy_", "tolist"]


@pytest.mark.parametrize(
    "read",
    [
        lambda device, host: host[: device[2]],
        lambda device, host: host[device[2]],
        lambda device, host: host.__setitem__(slice(0, device[2]), 0),
        lambda device, host: host[(device > 1,)],
        lambda device, host: host.narrow(0, 0, device[2]),
        lambda device, host: host.repeat_interleave(device),
        lambda device, host: torch.repeat_interleave(device),
        lambda device, host: torch.where(device > 1),
        lambda device, host: torch.bincount(device),
        lambda device, host: torch.tensor([device[0], device[1]]),
        lambda device, host: torch.arange(device[3]),
        lambda device, host: torch.zeros((device[3], 2)),
        lambda device, host: f"{device[0]:d}",
        lambda device, host: max(device),
    ],
)
def test_numbers_that_torch_needs_on_the_host_are_waits(read):
    device, host = torch.arange(4), torch.arange(4)
    with Watch([device], [host]) as watch:
        read(device, host)
    assert watch.found
    with Watch([], [device, host]) as watch:
        read(device, host)
    assert watch.found == []


@pytest.mark.parametrize(
    "work",
    [
        lambda device: device.repeat_interleave(device, output_size=6),
        lambda device: torch.where(device > 1, device, 0),
        lambda device: device.masked_fill(device > 1, 0),
        lambda device: device[device],
        lambda device: torch.zeros_like(device).narrow(0, 0, 2).view(2, 1).expand(2, 3),
        lambda device: [row + 1 for row in device],
    ],
)
def test_work_that_stays_on_the_device_is_none(work):
    device = torch.arange(4)
    with Watch([device], []) as watch:
        work(device)
    assert watch.found == []
