"""What is computed behind a layer's weights, in a Keras file and in a torch model, to compare the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from interfuse.models.keras_files import KerasLayer

DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.Identity,
)  # fmt: skip
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (*BATCH_NORMS, nn.LayerNorm)
ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Softmax: "softmax",
}
MAX_POOLS, AVG_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


@dataclass(frozen=True)
class Chain:
    """Activations, pools and normalisations in their order; whether it is known that nothing else follows
    before the next layer with weights."""

    steps: tuple[str, ...]
    complete: bool

    def __str__(self) -> str:
        return ", ".join(self.steps) or "nothing"


def same_chain(one: Chain, other: Chain) -> bool:
    """As far as both are known."""
    shared = min(len(one.steps), len(other.steps))
    if one.steps[:shared] != other.steps[:shared]:
        return False
    return not any(a.complete and len(b.steps) > len(a.steps) for a, b in ((one, other), (other, one)))


def _ordered(steps: Sequence[str], complete: bool) -> Chain:
    """ReLU before max pooling, which is the same the other way round."""
    found = list(steps)
    for i in range(len(found) - 1):
        if found[i].startswith("max pool") and found[i + 1] == "relu":
            found[i : i + 2] = found[i + 1], found[i]
    return Chain(tuple(found), complete)


def one_for_each(dimensions: int, value: Any) -> tuple[int, ...]:
    """What a module or a layer says of its dimensions, by one number where it is the same of all."""
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def _pool(kind: str, size: Sequence[int], stride: Sequence[int], more: str = "") -> str:
    numbers = "x".join(map(str, size)) + " by " + "x".join(map(str, stride))
    return f"{kind} pool of {numbers}{more}"


# --- Keras -------------------------------------------------------------------------------------------------


def theirs_after(layer: KerasLayer, layers: Sequence[KerasLayer]) -> Chain:
    steps: list[str] = []
    name = layer.name
    activation = layer.config.get("activation", "linear")
    while True:
        if not isinstance(activation, str):  # an activation of somebody's own
            return _ordered(steps, complete=False)
        if activation != "linear":
            steps.append({"swish": "silu"}.get(activation, activation))
        activation = "linear"
        readers = [other for other in layers if name in other.sources]
        if not readers:
            return _ordered(steps, complete=True)
        after = readers[0]
        if len(readers) > 1:
            return _ordered(steps, complete=False)
        if after.kind == "Activation":
            activation = after.config["activation"]
        elif after.kind in ("ReLU", "LeakyReLU", "Softmax"):
            activation = _activation_layer(after)
        elif "Pooling" in after.kind and not after.kind.startswith("Global"):
            steps.append(_pooling_layer(after))
        elif after.kind in ("BatchNormalization", "LayerNormalization"):
            steps.append("normalisation")
        elif "Dropout" not in after.kind:
            return _ordered(steps, complete=bool(after.weights) or after.kind in ("Flatten", "Concatenate"))
        name = after.name


def _activation_layer(layer: KerasLayer) -> Any:
    config = layer.config
    if layer.kind == "Softmax":
        return "softmax"
    slope = config.get("negative_slope", config.get("alpha", 0.3 if layer.kind == "LeakyReLU" else 0.0))
    if config.get("max_value") is not None or config.get("threshold"):
        return None
    return f"leaky_relu of {float(slope):.6g}" if slope else "relu"


def _pooling_layer(layer: KerasLayer) -> str:
    spatial = int(layer.kind[-2])
    size = one_for_each(spatial, layer.config["pool_size"])
    stride = one_for_each(spatial, layer.config.get("strides") or size)
    more = ""
    if layer.config.get("padding", "valid") != "valid":
        sizes = (layer.shape or (None,) * (spatial + 2))[1:-1]
        halves = {*size, *stride} == {2}
        if not (halves and all(n is not None and n % 2 == 0 for n in sizes)):
            more = ", the last one cut off" if halves else ", padding 'same'"
    return _pool("max" if layer.kind.startswith("Max") else "average", size, stride, more)


# --- torch -------------------------------------------------------------------------------------------------


def ours_after(module: Any, model: nn.Module) -> Chain:
    """What the module does itself, and what stands behind it where that is an nn.Sequential."""
    steps = [*_own_steps(module)]
    for after in _behind(module, model):
        if isinstance(after, DROPOUTS):
            continue
        if isinstance(after, nn.Flatten) or (
            not isinstance(after, NORMS) and getattr(after, "weight", None) is not None
        ):
            return _ordered(steps, complete=True)
        step = _step(after)
        if step is None:
            break
        steps.append(step)
    return _ordered(steps, complete=False)


def _behind(module: nn.Module, model: nn.Module) -> Iterator[nn.Module]:
    for parent in model.modules():
        if isinstance(parent, nn.Sequential):
            line = list(_in_a_row(parent))
            places = [i for i, other in enumerate(line) if other is module]
            if places:
                yield from line[places[0] + 1 :]
                return


def _in_a_row(parent: nn.Sequential) -> Iterator[nn.Module]:
    for child in parent:
        if isinstance(child, nn.Sequential):
            yield from _in_a_row(child)
        else:
            yield child


def _own_steps(module: Any) -> Iterator[str]:
    activation = getattr(module, "activation", None)
    if activation == "leaky_relu":
        yield f"leaky_relu of {module.negative_slope:.6g}"
    elif activation not in (None, "none"):
        yield activation
    if getattr(module, "pool", None) not in (None, "none"):
        stride = module.pool_stride or module.pool_size
        yield _padded_pool(
            "max" if module.pool == "max" else "average",
            module.pool_size, stride, module.pool_padding, module.ceil_mode)  # fmt: skip


def _step(module: Any) -> str | None:
    kind = type(module)
    if isinstance(module, NORMS):
        return "normalisation"
    if kind is nn.LeakyReLU:
        return f"leaky_relu of {module.negative_slope:.6g}"
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if kind in MAX_POOLS or kind in AVG_POOLS:
        spatial = int(kind.__name__[-2])
        size, stride, padding = (
            one_for_each(spatial, value) for value in (module.kernel_size, module.stride, module.padding)
        )
        return _padded_pool(
            "max" if kind in MAX_POOLS else "average", size, stride, padding, module.ceil_mode
        )
    return ACTIVATIONS.get(kind)


def _padded_pool(
    kind: str, size: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> str:
    more = ", the last one cut off" if ceil_mode else ""
    if any(padding):
        more += ", padding " + "x".join(map(str, padding))
    return _pool(kind, size, stride, more)
