"""The worked examples of plan, predict and decide, through the command line and the Python API as a user would call them.

1. A 7B on a Jetson AGX Orin: calibrated from one point by the bandwidth estimator, then by the full model; its memory with INT4 weights
   and an INT8 cache; its measured prefill, which four bits do not shorten; perplexities that fail NF4 and pass INT8.
4. The real configurations of five models: parameters exact to the tensor, and the seconds that `plan` takes in a process of its own.
5. What cannot be answered is refused or warned of, never answered with a confident number.

    python benchmarks/worked_examples.py [--json FILE]

(Bars 2 and 3 are `predict_accuracy.py` and `predict_here.py`.)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from _bars import Bar, NotMeasuredError, add_arguments, run_bars

from fewbit.errors import FewbitError
from fewbit.workflows.decide import decide_deployment
from fewbit.workflows.plan import plan_model
from fewbit.workflows.predict import predict_model

CONFIGS = Path(__file__).parents[1] / "tests" / "models" / "configs"
# Of the published checkpoints; DeepSeek-V3's extra layer for guessing several tokens is not loaded and not counted.
PARAMETERS = {
    "llama-3-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_419_200,
    "gemma-3-27b": 27_432_406_640,
}
ORIN = "agx-orin-64gb"
PREFILL = "bf16 prefill 16 x 1024 13.38 s"


def fewbit(*arguments: str) -> tuple[Any, float]:
    """JSON of a command in a process of its own, and the seconds it took."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "fewbit", *arguments, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotMeasuredError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}")
    return json.loads(done.stdout), time.perf_counter() - start


@cache
def by_bandwidth() -> Any:
    measured = ("--bandwidth", "200", "--measured", "bf16 decode 94 ms", "--estimator", "bandwidth")
    return fewbit("predict", "7e9", "--hardware", ORIN, *measured)[0]


def bandwidth_ms(name: str) -> float:
    """Milliseconds per token of a format, as the JSON prints them."""
    return float(next(one for one in by_bandwidth()["predictions"] if one["format"] == name)["milliseconds"]["value"])


def full_model(what: str) -> float:
    """Low end of the full model's INT4 interval over the bandwidth estimator's 23.5 ms, or its relative width."""
    result = predict_model("7e9", hardware=ORIN, bandwidth_gb_s=200.0, measured=["bf16 decode 94 ms"], schemes=["INT4"])
    found = result.predictions[0].milliseconds
    return found.value / bandwidth_ms("INT4") if what == "slower" else found.high / found.low


def deployed_gb(before: bool) -> float:
    """Weights and cache of the 7B with 16 sequences of 1,024 tokens."""
    plan = plan_model("7e9", scheme="W4A16", kv="KV-INT8", layers=28, kv_heads=4, head_dim=128, batch=16, context=1024)
    return (plan.deployed_bytes_before if before else plan.deployed_bytes_after) / 1e9


@cache
def prefill() -> Any:
    return predict_model("7e9", hardware=ORIN, measured=[PREFILL], schemes=["BF16", "INT4"], phases=["prefill"])


def prefill_figure(what: str) -> float:
    """Operations, rate and bound that follow from the measured prefill, and what INT4 makes of it."""
    step, int4 = prefill().measured[0], prefill().predictions[1]
    figures = {
        "tflop": step.operations / 1e12,
        "rate": step.tflop_s,
        "compute": float(step.bound == "compute"),
        "int4": int4.speedup_over_bf16.value,
        "said": float(
            any("INT4" in line or "W4A16" in line for line in prefill().conclusions if "not sped up" in line or "slower" in line)
        ),
    }
    return figures[what]


def perplexity_verdict(scheme: str, verdict: str) -> float:
    """Whether `decide` says so, and names the figure, given measured perplexities of +0.63 % and +8.0 %."""
    cell = decide_deployment(["7e9"], [ORIN], workload="single-stream", perplexity="bf16=10.0,int8=10.063,nf4=10.80").cells[0]
    found = next(one for one in cell.candidates if one.name == scheme)
    return float(found.quality.verdict == verdict and found.acceptable == (verdict == "pass"))


def parameters_off(name: str) -> float:
    """Parameters that the plan counts too many or too few."""
    return float(abs(plan_model(CONFIGS / f"{name}.json").parameters - PARAMETERS[name]))


def plan_seconds(name: str) -> float:
    """Wall time of the command, interpreter and imports included."""
    return fewbit("plan", str(CONFIGS / f"{name}.json"), "--scheme", "W4A16", "--hardware", "h100-sxm")[1]


def refused(call: Callable[[], object]) -> float:
    """1 when it raises an error of ours with a remedy."""
    try:
        call()
    except FewbitError as error:
        return float(bool(str(error)) and bool(error.remedy))
    return 0.0


def unknown_type() -> float:
    """1 when a configuration of an architecture that nobody knows is refused."""
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.json"
        config.write_text(json.dumps({"model_type": "frobnicator", "hidden_size": 64, "num_hidden_layers": 2}), encoding="utf-8")
        return refused(partial(plan_model, config))


def warned(call: Callable[[], Any], word: str) -> float:
    """1 when the answer warns in these words and the point is not used."""
    result = call()
    return float(any(word in line for line in result.warnings))


def nothing_chosen() -> float:
    """1 when contradictory limits (a millisecond per token and no loss on a small device) lead to no choice, and the reason is given."""
    cell = decide_deployment(["llama-3-70b"], ["jetson-orin-nano-8gb"], max_ms_per_token=1.0, max_quality_loss=0.0).cells[0]
    return float(cell.choice is None and cell.verdict == "not feasible" and bool(cell.reason))


def bars() -> list[Bar]:
    """Every bar, in the order of the examples."""
    impossible = partial(predict_model, "7e9", hardware=ORIN, measured=["bf16 decode 9.4 ms"])
    unknown_model = CONFIGS / "no-such-model.json"
    return [
        Bar("calibration-scale", lambda: float(by_bandwidth()["calibration_scale"]), "==", 1.34, "94 ms over 14 GB / 200 GB/s"),
        Bar("int8-ms-per-token", partial(bandwidth_ms, "INT8"), "==", 47.0, "bandwidth estimator, as printed"),
        Bar("int4-ms-per-token", partial(bandwidth_ms, "INT4"), "==", 23.5, "bandwidth estimator, as printed"),
        Bar("full-model-int4-over-bandwidth", partial(full_model, "slower"), ">", 1.0, "the full model's own, slower figure"),
        Bar("full-model-int4-interval", partial(full_model, "width"), ">", 1.0, "high over low"),
        Bar("deployed-gb-bf16-at-least", partial(deployed_gb, True), ">=", 14.5, "about 15 GB"),
        Bar("deployed-gb-bf16-at-most", partial(deployed_gb, True), "<=", 15.5, "about 15 GB"),
        Bar("deployed-gb-int4-at-least", partial(deployed_gb, False), ">=", 3.5, "about 4 GB"),
        Bar("deployed-gb-int4-at-most", partial(deployed_gb, False), "<=", 4.5, "about 4 GB"),
        Bar("prefill-tflop-at-least", partial(prefill_figure, "tflop"), ">=", 229.0, "16 x 1,024 tokens, two operations per parameter"),
        Bar("prefill-tflop-s-at-least", partial(prefill_figure, "rate"), ">=", 16.5, "about 17 TFLOP/s"),
        Bar("prefill-tflop-s-at-most", partial(prefill_figure, "rate"), "<=", 17.5, "about 17 TFLOP/s"),
        Bar("prefill-is-compute-bound", partial(prefill_figure, "compute"), "==", 1.0),
        Bar("prefill-int4-speedup", partial(prefill_figure, "int4"), "<=", 1.0, "four bits do not speed it up"),
        Bar("prefill-int4-said", partial(prefill_figure, "said"), "==", 1.0, "and the answer says so"),
        Bar("nf4-fails", partial(perplexity_verdict, "NF4", "fail"), "==", 1.0, "+8.0 % against 5 %"),
        Bar("int8-passes", partial(perplexity_verdict, "W8A16", "pass"), "==", 1.0, "+0.63 % against 5 %"),
        *(Bar(f"parameters-off-{name}", partial(parameters_off, name), "==", 0.0, f"of {PARAMETERS[name]:,}") for name in PARAMETERS),
        *(Bar(f"plan-seconds-{name}", partial(plan_seconds, name), "<", 2.0, "wall time of the whole process") for name in PARAMETERS),
        Bar("unknown-device", partial(refused, partial(predict_model, "7e9", hardware="toaster")), "==", 1.0),
        Bar("unknown-device-of-decide", partial(refused, partial(decide_deployment, ["7e9"], ["toaster"])), "==", 1.0),
        Bar("unknown-model", partial(refused, partial(plan_model, unknown_model)), "==", 1.0),
        Bar("unknown-model-type", unknown_type, "==", 1.0),
        Bar("contradictory-limits", nothing_chosen, "==", 1.0),
        Bar("impossible-time-of-predict", partial(warned, impossible, "impossible"), "==", 1.0),
        Bar(
            "impossible-time-of-decide",
            partial(warned, partial(decide_deployment, ["llama-2-7b"], [ORIN], measured=["bf16 decode 9.4 ms"]), "impossible"),
            "==",
            1.0,
        ),
        Bar(
            "impossible-time-of-bandwidth-estimator",
            partial(refused, partial(predict_model, "7e9", hardware=ORIN, measured=["bf16 decode 9.4 ms"], estimator="bandwidth")),
            "==",
            1.0,
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    options = parser.parse_args()
    return run_bars(bars(), list_only=options.list, json_file=options.json)


if __name__ == "__main__":
    sys.exit(main())
