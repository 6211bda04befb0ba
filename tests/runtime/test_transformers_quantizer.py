"""fewbit's own layout: read back bit for bit, refused where it is damaged, and loaded by transformers after `import fewbit`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.checkpoints.own import is_ignored, parse_scheme
from fewbit.checkpoints.registry import get_layout
from fewbit.checkpoints.runtimes import kind_of
from fewbit.checkpoints.sources import open_source
from fewbit.errors import CheckpointError, FewbitError, FormatError, UnsupportedModelError
from fewbit.formats.spec import QuantSpec, get_scheme
from fewbit.runtime.linear import QuantLinear
from fewbit.walk.settings import GateChoice, WalkSettings
from fewbit.workflows.quantize import quantize_model

WINDOW = torch.arange(40)[None] * 7 % 512


@pytest.fixture(scope="module")
def nf4(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / "nf4"
    settings = WalkSettings(gate=GateChoice(enabled=False))
    quantize_model(tiny_llama_dir, scheme="NF4", layout="fewbit", out=out, settings=settings, verify=())
    return out


def test_transformers_computes_what_our_runtime_computes(nf4: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(nf4, dtype=torch.float32)
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 14
    ours = fewbit.load(nf4, dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(WINDOW).logits
        assert torch.equal(theirs, ours.model(WINDOW).logits)
        assert theirs.std() > 0.1


def test_it_is_loaded_in_a_process_that_imports_fewbit_before_or_after(nf4: Path) -> None:
    program = """
import sys
import fewbit  # first: nothing of transformers is there yet
assert "transformers" not in sys.modules
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs, AUTO_QUANTIZER_MAPPING as known
assert "fewbit" in known and "fewbit" in configs

# And after transformers: the same process forgets fewbit and imports it again.
del known["fewbit"], configs["fewbit"]
for name in [name for name in sys.modules if name.partition(".")[0] == "fewbit"]:
    del sys.modules[name]
import fewbit
assert "fewbit" in known and "fewbit" in configs
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_kind_and_the_scheme_are_what_was_written(nf4: Path) -> None:
    source = open_source(nf4)
    assert source.scheme is not None and source.scheme.weights == get_scheme("NF4").weights
    assert kind_of(nf4).name == "fewbit" and source.layout == "fewbit"


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": None},
        {"scheme": {"name": "x"}},
        {"scheme": {"name": "x", "weights": {"num_bits": "4"}}},
        {"scheme": {"name": "x", "weights": {"num_bits": 4, "strategy": "group"}}},
        {"scheme": {"name": "x", "weights": {"num_bits": 4, "type": "new"}}},
        {"scheme": {"name": "x", "weights": {"num_bits": 4, "type": "codebook"}}},
        {"format_version": 2},
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(nf4: Path, change: dict[str, Any]) -> None:
    fields = json.loads((nf4 / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    with pytest.raises((CheckpointError, UnsupportedModelError), match="here"):
        parse_scheme({**fields, **change}, "here")


def test_what_the_layout_cannot_hold_is_refused() -> None:
    layout = get_layout("fewbit")
    assert layout.supports(get_scheme("KV-INT8")) is not None
    assert layout.supports(get_scheme("W2A16")) is None
    with pytest.raises(FormatError, match="whole bytes"):
        layout.check_shape("p", 8, 10, QuantSpec(3, strategy="channel"))


def test_ignored_names_are_whole_names_or_last_parts() -> None:
    assert is_ignored("lm_head", ("lm_head",)) and is_ignored("model.layers.0.mlp.down_proj", ("model.layers.0.mlp.down_proj",))
    assert not is_ignored("model.layers.10.mlp.down_proj", ("model.layers.1",))


def test_transformers_does_not_quantize_with_it(tiny_llama_dir: Path, nf4: Path) -> None:
    from transformers import AutoModelForCausalLM

    from fewbit.runtime.transformers_quantizer import FewbitConfig

    fields = json.loads((nf4 / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    with pytest.raises((FewbitError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir, quantization_config=FewbitConfig.from_dict(fields))
