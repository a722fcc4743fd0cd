"""Every exception that Ranger raises on purpose, and what the reader should do about it.

All of them derive from `RangerError`, so that one `except` clause catches what Ranger refuses and
nothing else. Each also derives from the built-in exception that a Python programmer would expect
(`ValueError` for a bad value, `ImportError` for a missing package), so that code which knows
nothing of Ranger handles it as usual.

A message states four things where they exist: the rule, the value that broke it, the place (the
operator, the file, the argument), and the way out.
"""

from __future__ import annotations


class RangerError(Exception):
    """Base of all errors raised by Ranger. Catch it to handle whatever Ranger refuses to do."""


class BudgetError(RangerError, ValueError):
    """The stated memory cannot be used.

    Either it is not an amount of memory ("12 parsecs", zero, a negative number): write it as bytes
    or as text such as "512MB" or "2GiB". Or no plan fits into it: give at least `least` bytes,
    shrink the input, or change the operator named by `binding`, which is what holds the peak up.

    Attributes:
        allowed: bytes that the user allowed, or None if the text could not be read as an amount.
        least: bytes of the smallest plan that was found, or None if no plan was looked for.
        binding: name of the operator at which the smallest plan peaks, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        allowed: int | None = None,
        least: int | None = None,
        binding: str | None = None,
    ) -> None:
        super().__init__(message)
        self.allowed = allowed
        self.least = least
        self.binding = binding


class UnitError(BudgetError):
    """The unit of an amount of memory is not known. Use B, kB, MB, GB, TB, KiB, MiB, GiB or TiB."""


class InputError(RangerError, ValueError):
    """An input does not suit the model, or cannot be read: wrong rank, shape, dtype, format or size.

    Give what the message asks for; the model itself is fine.
    """


class CaptureError(RangerError, RuntimeError):
    """The framework could not turn the model into a graph, for instance at a data-dependent branch.

    The message names the line of the model. Rewrite that line, or regionalize the submodules before
    and after it.
    """


class LayerError(CaptureError, ValueError):
    """A Keras model or layer cannot be captured: it leaves `keras.ops`, or its declared rule does not fit it.

    The message names the layer and its config. It is a ValueError, as Keras's own errors are.
    """


class PlanError(RangerError, RuntimeError):
    """A plan cannot be made or does not suit what it is applied to.

    For example: the requested `regions` or `schedule` are not possible for this model. Leave the
    override out, and the planner chooses.
    """


class GradientError(RangerError, RuntimeError):
    """A gradient was asked for that a program of regions does not have, such as the gradient of a gradient.

    Call the untouched module where it is needed: it has the same parameters.
    """


class PartitionError(RangerError, ValueError):
    """A partition, an aggregator or a layer over regions cannot be what it was asked to be.

    For example: more regions than elements, a capacity too small to hold all samples, outputs of regions that the
    aggregator cannot join, an unknown name. The message gives the rule, both values and the way out.
    """


class VerificationError(RangerError, RuntimeError):
    """A check of a plan or of its numbers against the untouched network failed.

    This is a defect in Ranger or a model that is not deterministic, never a fault of the budget. Do
    not use the result; run the untouched model and report the message.
    """


class MeasureError(RangerError, RuntimeError):
    """Memory cannot be counted here, for example because a counter or profiler is already running.

    Leave the outer `measure()` (or the outer profiler) first: PyTorch runs one at a time.
    """


class MissingExtraError(RangerError, ImportError):
    """An optional package is needed for this. Install it with the command in the message."""


class WriteError(RangerError, OSError):
    """A result, or what a run keeps beside it, could not be written: the disk is full, or the place was taken away.

    Nothing stands under the final name. What is done stays in the working folder; make room and give the same call again.
    """
