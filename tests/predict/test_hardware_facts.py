"""The table of devices hangs together: a rate with sparsity, a wrong capability or a slipped digit breaks one of these relations."""

from __future__ import annotations

import pytest

from fewbit.predict.hardware import HARDWARE, Hardware

NVIDIA = [device for device in HARDWARE.values() if device.kind.startswith("nvidia")]
ALL = list(HARDWARE.values())


def _name(device: Hardware) -> str:
    return device.name


@pytest.mark.parametrize("device", NVIDIA, ids=_name)
def test_formats_are_those_of_the_generation(device: Hardware) -> None:
    capability = device.capability
    assert capability is not None
    assert device.multiplies("fp8") == (capability >= 8.9)  # Ada on
    assert device.multiplies("fp4") == (capability >= 10.0)  # Blackwell on
    if capability >= 9.0:
        assert not device.multiplies("int4")  # Hopper and Blackwell have no INT4 matrix units
    assert device.multiplies("int8")


@pytest.mark.parametrize("device", NVIDIA, ids=_name)
def test_rates_double_as_bits_halve(device: Hardware) -> None:
    rates = device.dense_tflop_s
    # GeForce runs floating-point products with FP32 accumulation at half of their full rate: INT8 is four times the 16-bit rate there
    times = 4 if device.kind == "nvidia_consumer" else 2
    assert rates["int8"] / rates["bf16"] == pytest.approx(times, rel=0.03)
    if "fp8" in rates:
        assert rates["fp8"] / rates["bf16"] == pytest.approx(2, rel=0.03)
    if "int4" in rates:
        assert rates["int4"] / rates["int8"] == pytest.approx(2, rel=0.01)
    if "fp4" in rates:
        assert rates["fp4"] / rates["fp8"] == pytest.approx(4 if device.kind == "nvidia_consumer" else 2, rel=0.03)


@pytest.mark.parametrize("device", [d for d in NVIDIA if d.capability in (8.6, 8.9, 12.0)], ids=_name)
def test_matrix_units_against_ordinary_ones(device: Hardware) -> None:
    # An SM of these generations does 256 FP32 operations per cycle and 1,024 dense 16-bit ones (half of that on GeForce). A rate with 2:4
    # sparsity would be twice as high. The A10G is sold at a lower clock of its matrix units.
    ratio = device.dense_tflop_s["bf16"] / device.vector_tflop_s
    expected = 2 if device.kind == "nvidia_consumer" else 4
    assert ratio == pytest.approx(2.24 if device.name == "a10g" else expected, rel=0.02)


@pytest.mark.parametrize("device", ALL, ids=_name)
def test_magnitudes(device: Hardware) -> None:
    assert 5 <= device.memory_bytes / 2**30 <= 2048
    assert 30 <= device.bandwidth_gb_s <= 10_000
    # operations per byte at which a product stops being limited by memory: below 5 or above 1,000 no device of the table is
    assert 5 <= 1e3 * device.dense_tflop_s["bf16"] / device.bandwidth_gb_s <= 1000
    assert all(source.strip() for source in device.sources) and device.sources
    assert device.vector_tflop_s <= device.dense_tflop_s["bf16"] * 1.01
    assert not any(alias in HARDWARE for alias in device.aliases)
