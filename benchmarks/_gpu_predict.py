"""Section 6: `fewbit predict` against what sections 1 and 4 measured, one BF16 point given."""

from __future__ import annotations

from typing import Any

from fewbit.models.inventory_sources import read_inventory
from fewbit.predict.hardware import Hardware, get_hardware
from fewbit.predict.outline import outline_of
from fewbit.predict.prediction import KernelPath, MeasuredPoint, StepPoint
from fewbit.predict.predictor import Predictor

__all__ = ["predict_rows"]

_PATHS: dict[str, KernelPath] = {"W4A16": "fused"}


def _hardware(facts: dict[str, Any], machine: dict[str, Any]) -> Hardware:
    """The device by its name where the table knows it, else by the measured rates."""
    words = {
        "H200": "h200",
        "H100 PCIe": "h100-pcie",
        "H100": "h100-sxm",
        "A100": "a100-80gb",
        "RTX 5080": "rtx-5080",
        "RTX 4090": "rtx-4090",
    }
    known = next((name for word, name in words.items() if word in facts["device"]), None)
    if known is not None:
        return get_hardware(known)
    rates = {"bf16": machine["bf16_tflop_s"], "int8": machine["int8_tflop_s"], "fp8": machine.get("fp8_tflop_s")}
    return Hardware(
        name="measured", label=facts["device"], kind="nvidia_datacenter", memory_bytes=facts.get("memory_bytes", 80 << 30),
        bandwidth_gb_s=machine["read_gb_s"], dense_tflop_s={name: rate for name, rate in rates.items() if rate},
        vector_tflop_s=(machine["bf16_tflop_s"] or 1.0) / 8, capability=float(facts.get("capability", 9.0)), measured=True,
    )  # fmt: skip


def predict_rows(facts: dict[str, Any], machine: dict[str, Any], steps: list[dict[str, Any]], shapes: str) -> list[dict[str, Any]]:
    """Each measured step (`_gpu_end_to_end.measure_batches`) beside its prediction from the BF16 step at batch 1 alone."""
    anchor = next((row for row in steps if (row["scheme"], row["phase"], row["batch"]) == ("BF16", "decode", 1)), None)
    if anchor is None:
        return []
    point = StepPoint(context=anchor["context"])
    predictor = Predictor(_hardware(facts, machine), outline_of(read_inventory(shapes)), [MeasuredPoint(point, anchor["ms"])])
    rows = []
    for row in steps:
        wanted = StepPoint(row["phase"], row["scheme"], "BF16", row["batch"], row["context"], _PATHS.get(row["scheme"]))
        estimate = predictor.predict(wanted).milliseconds
        rows.append(
            {"scheme": row["scheme"], "phase": row["phase"], "batch": row["batch"], "measured_ms": row["ms"],
             "predicted_ms": estimate.value, "low_ms": estimate.low, "high_ms": estimate.high,
             "error": estimate.value / row["ms"] - 1.0, "given": row is anchor}
        )  # fmt: skip
    return rows
