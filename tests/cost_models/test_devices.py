"""Sizes in bytes as text, and the table of known devices."""

import pytest

from graphopt.cost_models.devices import (
    GB,
    KNOWN_DEVICES,
    GiB,
    format_bytes,
    get_device,
    parse_bytes,
)
from graphopt.errors import GraphoptError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("6GiB", 6 * GiB),
        ("500MB", 500_000_000),
        ("24 gb", 24 * GB),
        ("1.5KiB", 1536),
        ("17 B", 17),
        ("4096", 4096),
        (4096, 4096),
        (" 2TiB ", 2**41),
    ],
)
def test_parse_bytes(text: str | int, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("6G", "unknown unit 'G' in the size '6G'"),
        ("six", "cannot read 'six'"),
        ("-3GB", "cannot read '-3GB'"),
        ("", "cannot read ''"),
        ("1.2.3GB", "cannot read '1.2.3GB'"),
        (-1, "cannot be negative: -1"),
        (True, "cannot read True"),
        (1.5, "cannot read 1.5"),
    ],
)
def test_parse_bytes_says_what_it_cannot_read(text: object, said: str) -> None:
    with pytest.raises(GraphoptError, match=said):
        parse_bytes(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.00 kB"),
        (9_996, "10.0 kB"),
        (999_600, "1.00 MB"),
        (123_456_789, "123 MB"),
        (80 * GB, "80.0 GB"),
        (-1_500_000, "-1.50 MB"),
        (5_000_000 * GB, "5000 TB"),
    ],
)
def test_format_bytes(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


def test_formatted_bytes_parse_to_within_half_a_percent() -> None:
    for size_bytes in (1, 512, 39_200_000, 2**31, 141 * GB):
        assert parse_bytes(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=5e-3)


def test_unknown_device_names_the_closest_and_all() -> None:
    with pytest.raises(GraphoptError, match=r"'h10', did you mean 'h100'\? Known: a100, b200"):
        get_device("h10")
    with pytest.raises(GraphoptError, match=r"unknown device 'abacus'\. Known: .*cpu.*rtx4090"):
        get_device("abacus")


def test_known_devices_are_plausible() -> None:
    for name, device in KNOWN_DEVICES.items():
        assert device.name == name
        assert device.source.startswith("https://")
        assert device.flops("float32") >= device.flops("float64")
    # The ridge of an A100 in bfloat16 and of an H100, in operations per byte, dense matrices.
    assert get_device("a100").flops("bfloat16") / get_device("a100").bytes_per_s == pytest.approx(
        153, abs=1
    )
    assert get_device("h100").flops("bfloat16") / get_device("h100").bytes_per_s == pytest.approx(
        295, abs=1
    )


def test_flops_of_a_dtype_without_its_own_rate() -> None:
    import torch

    device = get_device("a100")
    assert device.flops(torch.bfloat16) == device.flops("bfloat16") == 312e12
    assert device.flops(torch.int64) == device.flops(torch.float32)
