"""The losses as modules. LinearCrossEntropyLoss holds the last linear layer, and forms no logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from interfuse.ops._losses_checks import fail
from interfuse.ops.losses import (
    binary_cross_entropy_with_logits,
    contrastive_loss,
    info_nce,
    linear_cross_entropy,
    reconstruction_loss,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self


class LinearCrossEntropyLoss(nn.Module):
    """torch.nn.LinearCrossEntropyLoss for labels that are class indices, of any leading shape.

    Its state_dict is torch's: linear.weight, linear.bias where there is one, weight if classes have weights.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    @classmethod
    def from_torch(cls, linear: nn.Module, loss: nn.CrossEntropyLoss | None = None) -> Self:
        """Of a torch.nn.Linear and the CrossEntropyLoss behind it, or of a torch.nn.LinearCrossEntropyLoss.

        The Parameters are shared.
        """
        if (
            loss is None
            and hasattr(nn, "LinearCrossEntropyLoss")
            and type(linear) is nn.LinearCrossEntropyLoss
        ):
            if linear.out_features != ():
                raise fail(f"out_features must be (); got a module with {linear.out_features}.")
            return cls._made(linear.linear, linear)
        if type(linear) is not nn.Linear or not (loss is None or type(loss) is nn.CrossEntropyLoss):
            given = ", ".join(type(m).__name__ for m in (linear, loss) if m is not None)
            raise fail(
                "from_torch takes a torch.nn.Linear and a torch.nn.CrossEntropyLoss, or a "
                f"torch.nn.LinearCrossEntropyLoss, and no subclass of them; got {given}."
            )
        return cls._made(linear, loss or nn.CrossEntropyLoss())

    @classmethod
    def _made(cls, linear: nn.Linear, loss: nn.Module) -> Self:
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.linear = linear
        made.register_buffer("weight", loss.weight)  # type: ignore[arg-type]
        made.reduction = loss.reduction  # type: ignore[assignment]
        made.ignore_index = -100 if loss.ignore_index is None else loss.ignore_index  # type: ignore[assignment]
        made.label_smoothing = loss.label_smoothing  # type: ignore[assignment]
        return made.train(linear.training)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """torch.nn.BCEWithLogitsLoss; the loss is one pass over memory, and its gradient another."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        return binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class ContrastiveLoss(nn.Module):
    """interfuse.ops.contrastive_loss of pairs of rows; the target is 1 where they belong together."""

    def __init__(self, margin: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.margin = margin
        self.reduction = reduction

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return contrastive_loss(input1, input2, target, self.margin, self.reduction)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, reduction={self.reduction!r}"


class InfoNCELoss(nn.Module):
    """interfuse.ops.info_nce; with `learned` the logarithm of the temperature is a parameter."""

    log_temperature: Tensor | None

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learned: bool = False,
        normalize: bool = True,
        symmetric: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        parameter = nn.Parameter(torch.tensor(temperature).log()) if learned else None
        self.register_parameter("log_temperature", parameter)
        self.normalize = normalize
        self.symmetric = symmetric
        self.reduction = reduction

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        learned = self.log_temperature
        return info_nce(
            input1,
            input2,
            self.temperature if learned is None else learned.exp(),
            normalize=self.normalize,
            symmetric=self.symmetric,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, learned={self.log_temperature is not None}, "
            f"normalize={self.normalize}, symmetric={self.symmetric}, reduction={self.reduction!r}"
        )


class ReconstructionLoss(nn.Module):
    """interfuse.ops.reconstruction_loss: an autoencoder's, over several modalities."""

    def __init__(
        self,
        kinds: str | Sequence[str] = "mse",
        weights: Sequence[float] | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.kinds = kinds
        self.weights = weights
        self.reduction = reduction

    def forward(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        return reconstruction_loss(inputs, targets, self.kinds, self.weights, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"kinds={self.kinds!r}, weights={self.weights!r}, reduction={self.reduction!r}"
