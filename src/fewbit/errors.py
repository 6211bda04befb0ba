"""The exception hierarchy of fewbit.

    FewbitError                     everything fewbit raises on purpose; the CLI prints it as one line and exits with 2
      |- UsageError                 an argument that cannot be meant: unknown variant, scheme, method, protocol, option value
      |- ModelError                 a model that cannot be used
      |    |- ModelNotFoundError    no such path, or no configuration / weights / tokenizer in it
      |    |- UnsupportedModelError an architecture or a layer that this operation does not know
      |- CheckpointError            damaged or inconsistent files: truncated safetensors, NaN weights, bad index
      |- FormatError                numbers that do not fit a format: group size that does not divide, wrong shape or dtype
      |- KernelError                no kernel can run what was asked for, or a strict run would have fallen back
      |- CorpusError                text that is missing, empty or too short
      |- MeasurementError           a measurement that failed or cannot be compared with another
      |- QualityError               a quantized model that lost more than its threshold allows
      |- OutputError                an output directory or file that cannot be written

Every message names the thing that is wrong, where it is and, in `remedy`, what to do about it.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CorpusError",
    "FewbitError",
    "FormatError",
    "KernelError",
    "MeasurementError",
    "ModelError",
    "ModelNotFoundError",
    "OutputError",
    "QualityError",
    "UnsupportedModelError",
    "UsageError",
]


class FewbitError(Exception):
    """Base of all errors that fewbit raises on purpose.

    Args:
        problem: what is wrong and where, one line, no trailing full stop.
        remedy: what the user can do about it, one line; empty when nothing sensible can be said.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}; {remedy}" if remedy else problem)


class UsageError(FewbitError):
    """An argument that cannot be meant."""


class ModelError(FewbitError):
    """A model that cannot be used."""


class ModelNotFoundError(ModelError):
    """The path does not exist, or lacks a configuration, weights or a tokenizer."""


class UnsupportedModelError(ModelError):
    """An architecture or a layer that the operation does not know."""


class CheckpointError(FewbitError):
    """Damaged or inconsistent checkpoint files."""


class FormatError(FewbitError):
    """Numbers, shapes or dtypes that do not fit a number format."""


class KernelError(FewbitError):
    """No kernel can run the request, or a strict run would have fallen back."""


class CorpusError(FewbitError):
    """Text that is missing, empty or too short."""


class MeasurementError(FewbitError):
    """A measurement that failed, or results that must not be compared."""


class QualityError(FewbitError):
    """A quantized model that lost more quality than its threshold allows."""


class OutputError(FewbitError):
    """An output directory or file that cannot be written."""
