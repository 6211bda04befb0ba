"""Mixtures of experts in the walk: every expert is found, calibrated and rounded, also one that no token reaches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.checkpoints.sources import open_source
from fewbit.models.experts import ExpertList, expert_lists, unfuse_experts
from fewbit.results import QuantizeResult
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.load import load_model
from fewbit.walk import block
from fewbit.walk.capture import find_groups, stages
from fewbit.walk.settings import WalkSettings
from fewbit.workflows.quantize import quantize_model

_SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    "initializer_range": 0.2,
}
_MOE: dict[str, Any] = {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(**_MOE, shared_expert_intermediate_size=64, decoder_sparse_step=1),
    "qwen3_moe": Qwen3MoeConfig(**_MOE, head_dim=8),  # type: ignore[call-arg]
}


def _mixture(windows: list[list[int]]) -> tuple[nn.Module, ExpertList, list[tuple[torch.Tensor, ...]]]:
    """A mixture, and for each window hidden states routed in turns to the experts that the window lists."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["mixtral"], dtype=torch.float32).eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    unfuse_experts(model)
    mixture = next(experts for _, experts in expert_lists(model))
    calls = []
    for experts in windows:
        index = torch.tensor([[experts[t % len(experts)], experts[(t + 1) % len(experts)]] for t in range(32)])
        calls.append((torch.randn(32, 32), index, torch.full((32, 2), 0.5)))
    return model, mixture, calls  # type: ignore[return-value]


@pytest.mark.parametrize("calibrating", [False, True])
def test_groups_of_experts_wherever_their_tokens_come_first(calibrating: bool) -> None:
    _, mixture, calls = _mixture([[0, 2], [1, 2]])
    if calibrating:
        mixture.start_calibration()
    linears = {name: module for name, module in mixture.named_modules() if isinstance(module, nn.Linear)}
    groups = find_groups({f"experts.{name}": linear for name, linear in linears.items()}, lambda window: mixture(*calls[window]), 2)
    expected = {(f"experts.{e}.gate_proj", f"experts.{e}.up_proj") for e in range(4)} | {(f"experts.{e}.down_proj",) for e in range(4)}
    assert {group.names for group in groups} == expected
    assert [len(stage) for stage in stages(groups)] == [4, 4]
    assert stages(groups)[0][0].names[0].endswith("gate_proj")


# ---------------------------------------------------------------------------------------------------------- whole models


def write_mixture(name: str, directory: Path, tokenizer_of: Path) -> Path:
    """A tiny mixture of six experts: no token is ever sent to the last two, and the first one's weights are zero."""
    sizes = {"vocab_size": 512, "max_position_embeddings": 64, "num_local_experts": 6, "num_experts": 6}
    config = type(CONFIGS[name])(**{**CONFIGS[name].to_dict(), **sizes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for layer in model.model.layers:
            router = layer.mlp.gate.weight
            # Whatever the token, the two largest of v x, -v x, u x, -u x, 0, 0 are not among the last two.
            router[1], router[3], router[4], router[5] = -router[0], -router[2], 0, 0
            layer.mlp.experts.gate_up_proj[0] = 0
            layer.mlp.experts.down_proj[0] = 0
    model.save_pretrained(directory)
    for file in tokenizer_of.glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.mark.parametrize(("name", "method"), [*((n, m) for n in CONFIGS for m in ("rtn", "gptq")), ("qwen2_moe", "awq+gptq")])
def test_never_routed_and_dead_experts(name: str, method: str, tiny_llama_dir: Path, small: WalkSettings, tmp_path: Path) -> None:
    source = write_mixture(name, tmp_path / "source", tiny_llama_dir)
    result = quantize_model(source, scheme="W4A16-G32", method=method, out=tmp_path / "out", settings=small)
    before, after = SafetensorsFiles(source), open_source(tmp_path / "out")
    assert set(after.names()) == set(before.names())
    experts = [layer for layer in result.layers if ".experts." in layer.name]
    assert len(experts) == 2 * 6 * 3 and all(f"{layer.name}.weight" in before for layer in experts)
    for tensor in after.names():
        assert bool(torch.isfinite(after.get(tensor)).all()), tensor
        if method != "awq+gptq":  # which moves scales between layers
            error = (after.get(tensor).float() - before.get(tensor).float()).norm()
            assert error <= 0.25 * before.get(tensor).float().norm(), tensor
    assert all(layer.error < 0.3 for layer in result.layers if layer.error is not None and ".experts.0." not in layer.name)
    assert all(layer.error == 0 for layer in result.layers if layer.error is not None and ".experts.0." in layer.name)
    if method != "rtn":
        _check_coverage(result)
    model = load_model(after, QuantizationConfig(after.scheme))  # type: ignore[arg-type]
    assert bool(torch.isfinite(model.model(torch.arange(16)[None], use_cache=False).logits).all())


def _check_coverage(result: QuantizeResult) -> None:
    for walked in result.blocks:
        (report,) = walked.experts
        assert sum(report.tokens) == 2 * 4 * 32 and report.tokens[4:] == [0, 0]  # two experts for each of four windows of 32 tokens
        assert set(report.starved) >= {4, 5} and report.required_tokens == 64 and report.lent_tokens >= 64
    lent = [layer for layer in result.layers if ".experts.5." in layer.name]
    assert all(layer.tokens >= 64 and layer.error is not None for layer in lent)
    assert any("calibration tokens per expert" in note for note in result.notes)


def test_calibration_makes_rare_experts_better_than_rounding(tiny_llama_dir: Path, small: WalkSettings, tmp_path: Path) -> None:
    """On held-back tokens, which an unrouted expert is lent as well."""
    source = write_mixture("mixtral", tmp_path / "source", tiny_llama_dir)
    many = replace(small, calibration=replace(small.calibration, samples=16))
    result = quantize_model(source, scheme="W3A16", group_size=32, method="gptq", out=tmp_path / "out", settings=many)
    never = [layer for layer in result.layers if ".experts.4." in layer.name or ".experts.5." in layer.name]
    assert len(never) == 12
    assert sum(layer.error < layer.rtn_error for layer in never if layer.error and layer.rtn_error) >= 10


def test_experts_in_parts_give_the_same_numbers(
    tiny_llama_dir: Path, small: WalkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_mixture("qwen3_moe", tmp_path / "source", tiny_llama_dir)
    whole = quantize_model(source, scheme="W4A16-G32", method="gptq", out=tmp_path / "whole", settings=small)
    monkeypatch.setattr(block, "_STAGE_BYTES", 2 * 4 * 64**2)
    parts = quantize_model(source, scheme="W4A16-G32", method="gptq", out=tmp_path / "parts", settings=small)
    assert SafetensorsFiles(tmp_path / "whole").sha256() == SafetensorsFiles(tmp_path / "parts").sha256()
    assert [layer.error for layer in whole.layers] == [layer.error for layer in parts.layers]


@pytest.mark.parametrize("scheme", ["W4A16-G32", "FP8A16", "MXFP4"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_transformers_reads_the_experts(name: str, scheme: str, tiny_llama_dir: Path, ungated: WalkSettings, tmp_path: Path) -> None:
    """The same logits to the bit where transformers knows the format for experts; `workflows.quantize_plan` says where it does not."""
    source = write_mixture(name, tmp_path / "source", tiny_llama_dir)
    quantize_model(source, scheme=scheme, out=tmp_path / "out", settings=ungated)
    read = open_source(tmp_path / "out")
    ours = load_model(read, QuantizationConfig(read.scheme, kernel="unfused")).model  # type: ignore[arg-type]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, experts_implementation="eager")
    theirs.eval()  # type: ignore[no-untyped-call]
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits)


def test_what_transformers_does_not_read_is_said(tiny_llama_dir: Path, ungated: WalkSettings, tmp_path: Path) -> None:
    source = write_mixture("mixtral", tmp_path / "source", tiny_llama_dir)
    fp4 = quantize_model(source, scheme="NVFP4", out=tmp_path / "nvfp4", settings=ungated)
    assert any("without their global scale" in note for note in fp4.notes)
    assert "without their global scale" in (tmp_path / "nvfp4" / "README.md").read_text(encoding="utf-8")
    w8a8 = quantize_model(source, scheme="W8A8", out=tmp_path / "w8a8", settings=ungated)
    assert any("cannot load experts" in note for note in w8a8.notes)
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "w8a8", dtype=torch.bfloat16)
    some = quantize_model(
        source, scheme="W4A16-G32", out=tmp_path / "some", settings=ungated, ignore=("lm_head", "model.layers.0.mlp.experts.3.*")
    )
    assert some.quantized_linears == w8a8.quantized_linears - 3 and any("only some experts of 1 mixtures" in note for note in some.notes)
    routers = ["model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"]
    assert set(routers) <= set(w8a8.ignored_linears)


def test_experts_of_another_kind_stay_in_high_precision_and_it_is_said(tiny_llama_dir: Path, ungated: WalkSettings, tmp_path: Path) -> None:
    config = GptOssConfig(**{**_SIZES, "vocab_size": 512, "head_dim": 8, "num_hidden_layers": 1}, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")  # type: ignore[no-untyped-call]
    for file in tiny_llama_dir.glob("tokenizer*"):
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    result = quantize_model(tmp_path / "source", scheme="W4A16-G32", out=tmp_path / "out", settings=ungated)
    assert result.quantized_linears == 4 and any("experts stay in high precision" in note for note in result.notes)
    assert result.effective_bits_per_parameter > 14


def test_an_interrupted_walk_goes_on_with_the_same_bytes(tiny_llama_dir: Path, small: WalkSettings, tmp_path: Path) -> None:
    """Names of the disk, lent tokens and the report of the experts survive in what was kept of the first block."""
    source = write_mixture("mixtral", tmp_path / "source", tiny_llama_dir)
    whole = quantize_model(source, scheme="W4A16-G32", method="gptq", out=tmp_path / "whole", settings=small)

    def interrupt(done: int, *_: object) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(source, scheme="W4A16-G32", method="gptq", out=tmp_path / "parts", settings=small, progress=interrupt)
    resumed = quantize_model(source, scheme="W4A16-G32", method="gptq", out=tmp_path / "parts", settings=small)
    assert [walked.resumed for walked in resumed.blocks] == [True, False]
    assert [walked.experts for walked in resumed.blocks] == [walked.experts for walked in whole.blocks]
    assert SafetensorsFiles(tmp_path / "whole").sha256() == SafetensorsFiles(tmp_path / "parts").sha256()
