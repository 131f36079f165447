"""What stands in a file that Keras wrote: its layers, how they are connected, and their weights.

Read with h5py alone. keras would build the model to get at its weights, and Keras 3 refuses many files of
TensorFlow's Keras 2 for settings that it has dropped (an LSTM's time_major, for one); nor is any code of the
file run this way.
"""

from __future__ import annotations

import io
import json
import pathlib
import re
import zipfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class KerasLayer:
    """A layer of Keras: its class, its name, its weights in Keras's order and its settings; the names of the
    layers whose outputs it takes, and the first one's shape, batch included, where the file tells."""

    kind: str
    name: str
    weights: Sequence[np.ndarray] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    shape: Shape | None = None


def read(path: str | pathlib.Path) -> list[KerasLayer]:
    """All layers of a .keras or .h5 file, those of nested models in the place of the model."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            f"load_keras reads files with h5py, which cannot be imported: {error}. "
            "`pip install 'interfuse[keras]'` brings it."
        ) from error
    path = pathlib.Path(path)
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if not {"config.json", "model.weights.h5"} <= names:
                raise ValueError(f"{path} is no .keras file: config.json or model.weights.h5 is not in it.")
            model = json.loads(archive.read("config.json"))
            weights = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(weights, "r") as file:
            return list(_layers_of(model, _Groups(file), str(path)))
    if path.is_file() and h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            if "model_config" not in file.attrs or "model_weights" not in file:
                raise ValueError(
                    f"{path} holds weights and no model: save the whole model, with model.save(...) in Keras."
                )
            return list(
                _layers_of(json.loads(file.attrs["model_config"]), _Legacy(file["model_weights"]), str(path))
            )
    if path.exists():
        raise ValueError(
            f"{path} is neither a .keras nor an .h5 file. Save the model as one: model.save('model.keras')."
        )
    raise FileNotFoundError(f"There is no file {path}.")


class _Groups:
    """Weights in a .keras file: layers by the name of their class and a number, variables by their number."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def children(self, layers: Sequence[Mapping[str, Any]]) -> Sequence[_Groups]:
        if "_layer_checkpoint_dependencies" in self._group:
            return self._numbered_with_gaps(layers, self._group["_layer_checkpoint_dependencies"])
        counts: dict[str, int] = {}
        found = []
        for layer in layers:
            name = _snake_case(layer["class_name"])
            count = counts[name] = counts.get(name, -1) + 1
            key = f"layers/{name}_{count}" if count else f"layers/{name}"
            found.append(_Groups(self._group.get(key, {})))
        return found

    @staticmethod
    def _numbered_with_gaps(layers: Sequence[Mapping[str, Any]], groups: Any) -> list[_Groups]:
        """Keras 2.12 and 2.13 count some layers twice: of each class, those that have weights, in order."""
        left: dict[str, list[_Groups]] = {}
        for key in sorted(groups, key=lambda key: (len(key), key)):
            group = _Groups(groups[key])
            if group.arrays():
                left.setdefault(re.sub(r"_\d+$", "", key), []).append(group)
        found = []
        for layer in layers:
            of_class = left.get(_snake_case(layer["class_name"]), [])
            found.append(of_class.pop(0) if of_class else _Groups({}))
        return found

    def arrays(self) -> list[np.ndarray]:
        return list(_variables(self._group))


def _variables(group: Any) -> Iterator[np.ndarray]:
    own = group.get("vars", {})
    for key in sorted(own, key=int):
        yield own[key][()]
    # A Bidirectional's forward layer comes first. A generator's seed, which dropout has, is no weight.
    for key in sorted(group, key=lambda key: (key == "backward_layer", key)):
        if key not in ("vars", "seed_generator"):
            yield from _variables(group[key])


def _snake_case(name: str) -> str:
    """As Keras turns the name of a class into the name of a group."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


class _Legacy:
    """Weights in an .h5 file: a group for each layer of the outermost model, in it the variables by their
    path; those of a nested model stand together, with the names of its layers in their paths."""

    def __init__(self, group: Any = None, named: Sequence[tuple[str, np.ndarray]] | None = None) -> None:
        self._group, self._named = group, named

    def children(self, layers: Sequence[Mapping[str, Any]]) -> Sequence[_Legacy]:
        names = [layer["config"]["name"] for layer in layers]
        if self._named is None:
            return [_Legacy(named=self._variables(name)) for name in names]
        return [_Legacy(named=[pair for pair in self._named if name in pair[0].split("/")]) for name in names]

    def _variables(self, layer: str) -> list[tuple[str, np.ndarray]]:
        if layer not in self._group:
            return []
        group = self._group[layer]
        return [(name, group[name][()]) for name in _names(group, "weight_names")]

    def arrays(self) -> list[np.ndarray]:
        return [array for _, array in self._named or ()]


def _names(group: Any, key: str) -> list[str]:
    """An attribute of names, which HDF5 keeps in parts where it is long."""
    parts = [group.attrs[key]] if key in group.attrs else []
    while f"{key}{len(parts)}" in group.attrs:
        parts.append(group.attrs[f"{key}{len(parts)}"])
    return [name.decode() if isinstance(name, bytes) else str(name) for part in parts for name in part]


def _layers_of(
    model: Mapping[str, Any],
    weights: _Groups | _Legacy,
    where: str,
    given: tuple[str, ...] = (),
) -> Iterator[KerasLayer]:
    """The layers of one model; `given` are the names of what a nested one takes."""
    config = model["config"]
    layers = config if isinstance(config, list) else config.get("layers")
    if layers is None:
        raise ValueError(
            f"{where} holds a {model['class_name']}, a class of its own, whose layers its file does not "
            "tell. Only Sequential and Functional models can be read."
        )
    prefix = f"{where}/" if given else ""
    graph = isinstance(config, dict) and "input_layers" in config
    inputs = _histories(config["input_layers"]) if graph else []
    stands_for: dict[str, tuple[str, ...]] = dict(zip(inputs, ((name,) for name in given), strict=False))
    before = given
    each: Sequence[_Groups | _Legacy] = weights.children(layers)
    for layer, own in zip(layers, each, strict=True):
        settings = layer["config"]
        name = layer.get("name") or settings["name"]
        if name in stands_for:  # a nested model's input is what the outer one gives it
            continue
        sources, shape = before, None
        if graph:
            nodes = layer.get("inbound_nodes") or [[]]
            node = nodes[0].get("args") or nodes[0].get("kwargs") if isinstance(nodes[0], dict) else nodes[0]
            direct = list(_histories(node))
            sources = tuple(s for source in direct for s in stands_for.get(source, (prefix + source,)))
            shape = _shape(node)
        if "layers" in settings:
            inner = list(_layers_of(layer, own, prefix + name, sources or (prefix + name,)))
            yield from inner
            ends = _histories(settings["output_layers"]) if "output_layers" in settings else []
            outputs = tuple(f"{prefix}{name}/{end}" for end in ends) or (inner[-1].name,)
            stands_for[name] = before = outputs
            continue
        kind = layer["class_name"]
        built = (layer.get("build_config") or {}).get("input_shape")
        if built and all(size is None or isinstance(size, int) for size in built):
            shape = tuple(built)
        while kind == "TimeDistributed":  # whose layer sees one step at a time
            kind, settings, shape = settings["layer"]["class_name"], settings["layer"]["config"], None
        yield KerasLayer(kind, prefix + name, own.arrays(), settings, sources, shape)
        before = (prefix + name,)


def _histories(node: Any) -> Iterator[str]:
    """The names of the layers that a node's tensors come from: each stands as [name, node, tensor, ...]."""
    if isinstance(node, dict):
        if node.get("class_name") == "__keras_tensor__":
            yield node["config"]["keras_history"][0]
        else:
            for value in node.values():
                yield from _histories(value)
    elif isinstance(node, (list, tuple)):
        if len(node) >= 3 and isinstance(node[0], str) and isinstance(node[1], int):
            yield node[0]
        else:
            for value in node:
                yield from _histories(value)


def _shape(node: Any) -> Shape | None:
    """The first tensor's, where the node tells."""
    if isinstance(node, dict):
        return tuple(node["config"]["shape"]) if node.get("class_name") == "__keras_tensor__" else None
    return next((s for s in map(_shape, node) if s is not None), None) if isinstance(node, list) else None
