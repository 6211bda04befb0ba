"""What a walk is asked to do: the chain of methods and everything that the numbers depend on.

A method is written as a chain, `transform + rounding + tuning`, each part optional:

    rtn, gptq, gptaq, hqq, llm_int8    how numbers are rounded
    awq, smoothquant            a scale per channel moved between layers before rounding: awq+gptq
    autoround                   rounding learned by reconstructing the block's output afterwards: gptq+autoround

`Recipe.parse` reads it. All settings together have a hash (`walk.progress`), because a walk that is resumed must go on as it began.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fewbit.errors import UsageError
from fewbit.formats.scales import Observer
from fewbit.methods.gptq import ActOrder, GPTQSettings
from fewbit.methods.learned_rounding import LearnedRoundingSettings

__all__ = [
    "ROUNDINGS",
    "TRANSFORMS",
    "TUNINGS",
    "CalibrationChoice",
    "GateChoice",
    "Recipe",
    "WalkSettings",
    "WorkingPrecision",
    "walk_settings",
]

# What each name does, for `--help` and for messages; `walk.methods` has the functions.
TRANSFORMS: Mapping[str, str] = {
    "awq": "scales salient input channels up before rounding",
    "smoothquant": "moves outliers of the activations into the weights",
}
ROUNDINGS: Mapping[str, str] = {
    "rtn": "to nearest, no calibration",
    "gptq": "columns one after the other, later ones make up for earlier ones",
    "gptaq": "GPTQ that also makes up for the error of the layers in front",
    "hqq": "half-quadratic splitting, no calibration",
    "llm_int8": "INT8 to nearest; input columns with outliers run in 16 bit",
}
TUNINGS: Mapping[str, str] = {"autoround": "rounding learned by reconstructing each block's output"}

WorkingPrecision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Recipe:
    """A parsed chain of methods.

    Attributes:
        text: as it is shown.
        transform, tuning: None when the chain has none.
        rounding: `rtn` when the chain names none.
    """

    text: str
    transform: str | None
    rounding: str
    tuning: str | None

    @property
    def calibrated(self) -> bool:
        """Whether the inputs of the linears must be known."""
        return self.transform is not None or self.tuning is not None or self.rounding in ("gptq", "gptaq")

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read a chain such as `awq+gptq`.

        Raises:
            UsageError: an unknown name, two of a kind, or names in another order than they are carried out.
        """
        parts = [part.strip().lower() for part in text.split("+")]
        kinds: list[str] = []
        for part in parts:
            kind = next((kind for kind, table in (("1", TRANSFORMS), ("2", ROUNDINGS), ("3", TUNINGS)) if part in table), "")
            if not kind:
                known = ", ".join([*ROUNDINGS, *TRANSFORMS, *TUNINGS])
                raise UsageError(f"unknown method '{part}'", f"choose one of {known}, or a chain such as awq+gptq")
            kinds.append(kind)
        if sorted(set(kinds)) != kinds:
            raise UsageError(f"'{text}' is no chain of methods", "at most one of each: transform + rounding + tuning, as in awq+gptq")
        chosen = dict(zip(kinds, parts, strict=True))
        return cls("+".join(parts), chosen.get("1"), chosen.get("2", "rtn"), chosen.get("3"))


@dataclass(frozen=True)
class CalibrationChoice:
    """Which text calibrated methods see; `walk.calibration.load_calibration` explains each.

    Attributes:
        files, dataset: the training part of the standard library when neither is given.
        samples, sequence_length: windows and tokens of each.
        chat_template: wrap the text in the tokenizer's chat template.
    """

    files: tuple[Path, ...] = ()
    dataset: str | None = None
    samples: int = 128
    sequence_length: int = 512
    chat_template: bool = False


@dataclass(frozen=True)
class GateChoice:
    """The comparison with the model in high precision at the end.

    Attributes:
        enabled: False skips it, and the model card says so.
        texts: files of held-out text; the held-out part of the standard library when empty.
        threshold: KL divergence in nats per token that fails; the scheme's own when None (`walk/gate.toml`).
        windows, sequence_length: how much text.
        force: write a checkpoint that failed, marked.
    """

    enabled: bool = True
    texts: tuple[Path, ...] = ()
    threshold: float | None = None
    windows: int = 16
    sequence_length: int = 512
    force: bool = False


@dataclass(frozen=True)
class WalkSettings:
    """Everything that a walk's numbers depend on, besides source and scheme.

    Attributes:
        method: the chain, see the module's header.
        observer: how RTN chooses its scales; None: `minmax`, and after AWQ the clipping search (`methods.clipping`).
        gptq: GPTQ's own settings. learned: those of learned rounding.
        migration_strength: SmoothQuant's, one for the whole model; None searches it for each group of linears.
        seed: of everything that is drawn.
        precision: in which the model is computed; `auto` is float32 unless the CPU multiplies bfloat16 natively.
        true_sequential: a group's inputs are taken after the groups before it in the same block were rounded; False takes all inputs of a
            block in one run over the unrounded block, which is faster and a little worse.
        memory_bytes: that hidden states may take in memory; None: a quarter of the machine's. It changes no number.
        calibration, gate: which text.
    """

    method: str = "rtn"
    observer: Observer | None = None
    gptq: GPTQSettings = field(default_factory=GPTQSettings)
    learned: LearnedRoundingSettings = field(default_factory=LearnedRoundingSettings)
    migration_strength: float | None = None
    seed: int = 0
    precision: WorkingPrecision = "auto"
    true_sequential: bool = True
    memory_bytes: int | None = None
    calibration: CalibrationChoice = field(default_factory=CalibrationChoice)
    gate: GateChoice = field(default_factory=GateChoice)

    @property
    def recipe(self) -> Recipe:
        """The parsed chain.

        Raises:
            UsageError: it cannot be read.
        """
        return Recipe.parse(self.method)


def walk_settings(
    *, observer: str | None = None, actorder: str | None = None, dampening: float | None = None, precision: str = "auto", **others: Any
) -> WalkSettings:
    """Settings out of words, as a command line has them; None leaves a setting as it is.

    Args:
        observer, precision: names of `WalkSettings`. actorder, dampening: of `GPTQSettings`.
        others: fields of `WalkSettings`.

    Raises:
        UsageError: a name that does not exist.
        FormatError: a dampening that cannot be meant.
    """
    choices = {"observer": (observer, Observer), "actorder": (actorder, ActOrder), "precision": (precision, WorkingPrecision)}
    for what, (given, names) in choices.items():
        if given is not None and given not in get_args(names):
            raise UsageError(f"unknown {what} '{given}'", f"choose one of {', '.join(get_args(names))}")
    chosen = {name: value for name, value in (("actorder", actorder), ("dampening", dampening)) if value is not None}
    settings = WalkSettings(observer=observer, precision=precision, **others)  # type: ignore[arg-type]
    return replace(settings, gptq=replace(settings.gptq, **chosen))  # type: ignore[arg-type]
