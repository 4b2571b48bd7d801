"""The CPU's measured rates: plausible, and kept only where they can be trusted."""

import json

import pytest

from graphopt.cost_models import calibrate
from graphopt.cost_models.devices import get_device

RATES = {"bfloat16": 4e11, "float32": 2e11, "copied bytes": 5e10, "ops": 5e5}


@pytest.fixture
def rounds(monkeypatch) -> list[dict[str, float]]:
    """What the next rounds of measurement will find, on a machine at rest."""
    found: list[dict[str, float]] = []
    monkeypatch.setattr(calibrate, "_measure_rates", lambda: found.pop(0))
    monkeypatch.setattr(calibrate.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return found


def test_measured_rates_are_plausible(monkeypatch) -> None:
    monkeypatch.setattr(calibrate, "_BUDGET_S", 0.01)
    device = calibrate.calibrated_cpu(cache=None)
    assert (device.name, device.kind) == ("cpu", "cpu")
    assert {name for name, _ in device.flops_per_s} == {"bfloat16", "float16", "float32", "float64"}
    assert 1e8 < device.flops("float32") < 1e15
    assert 1e8 < device.bytes_per_s < 1e13
    assert 1e-8 < device.overhead_s < 1e-2
    assert device.memory_bytes > 2**28


def test_best_of_two_rounds_is_kept(rounds, tmp_path) -> None:
    rounds += [RATES, {**RATES, "float32": 2.5e11}]
    device = calibrate.calibrated_cpu(tmp_path)
    assert device.flops_per_s == (("bfloat16", 4e11), ("float32", 2.5e11))
    assert (device.bytes_per_s, device.overhead_s) == (5e10, 2e-6)
    assert calibrate.calibrated_cpu(tmp_path) == device  # no rounds are left: it was read
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["name"] == "cpu"


def test_disturbed_measurement_is_not_kept(rounds, tmp_path) -> None:
    rounds += [RATES, {**RATES, "ops": 1e5}]
    assert calibrate.calibrated_cpu(tmp_path).overhead_s == 2e-6
    assert list(tmp_path.iterdir()) == []


def test_measurement_on_a_busy_machine_is_not_kept(rounds, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(calibrate.os, "getloadavg", lambda: (1e3, 0.0, 0.0))
    rounds += [RATES, RATES]
    calibrate.calibrated_cpu(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_number_of_threads_is_measured_anew(rounds, tmp_path, monkeypatch) -> None:
    rounds += [RATES, RATES]
    calibrate.calibrated_cpu(tmp_path)
    monkeypatch.setattr(calibrate.torch, "get_num_threads", lambda: 97)
    rounds += [{**RATES, "ops": 1e6}] * 2
    assert calibrate.calibrated_cpu(tmp_path).overhead_s == 1e-6
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_or_unwritable_cache_is_measured_anew(rounds, tmp_path) -> None:
    rounds += [RATES] * 4
    calibrate.calibrated_cpu(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text('{"name": "cp')
    assert calibrate.calibrated_cpu(tmp_path).overhead_s == 2e-6
    rounds += [RATES] * 2
    assert calibrate.calibrated_cpu(file / "no-folder").overhead_s == 2e-6


def test_get_device_cpu_is_the_calibrated_one(monkeypatch) -> None:
    monkeypatch.setattr(calibrate, "calibrated_cpu", lambda: "measured")
    assert get_device("cpu") == "measured"
