"""`interfuse explain TARGET`: the model that a script or a module names, and tensors of given shapes."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import re
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import interfuse

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from interfuse.rewrite.report import Explanation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}


class NotFoundError(Exception):
    """What was asked for is not there; the message is a sentence for the one who asked."""


def explanation(target: str, inputs: Sequence[str]) -> Explanation:
    """What optimize() does with the model, decided by measurement where there are inputs."""
    tensors = tuple(tensor_of(text) for text in inputs)
    model = model_of(target)
    return interfuse.explain(interfuse.optimize(model, tensors or None))


def model_of(target: str) -> nn.Module:
    """The model of `module:name` or `script.py:name`, where name is a model, or a class or function that
    gives one when it is called without arguments."""
    place, _, name = target.rpartition(":")
    if not place:
        place, name = target, ""
    module = module_of(place)
    if not name:
        raise NotFoundError(f"Name a model of {place}, as in {place}:NAME. {_candidates(place, module)}")
    try:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise NotFoundError(f"{place} has no '{name}'. {_candidates(place, module)}") from None
    if callable(found) and not isinstance(found, nn.Module):
        found = found()
    if not isinstance(found, nn.Module):
        raise NotFoundError(
            f"{target} gives {type(found).__name__}; it must be a torch.nn.Module, or something that gives "
            "one when it is called without arguments."
        )
    return found


def module_of(place: str) -> ModuleType:
    if not place.endswith(".py"):
        here = str(pathlib.Path.cwd())
        sys.path.insert(0, here)  # as `python -m` does
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # something that the module itself imports
            raise NotFoundError(
                f"There is no module '{place}' here or among the installed ones; a script is named by "
                "its path, as in path/to/script.py:name."
            ) from None
        finally:
            sys.path.remove(here)
    path = pathlib.Path(place).resolve()
    if not path.is_file():
        raise NotFoundError(f"There is no file {place}.")
    # Under a name of its own: a script may be called like a module that is imported already.
    spec = importlib.util.spec_from_file_location(f"explained_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise NotFoundError(f"{place} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the reading of its source looks
    sys.path.insert(0, str(path.parent))  # its neighbours, as when Python runs it
    spec.loader.exec_module(module)
    return module


def _candidates(place: str, module: ModuleType) -> str:
    """A sentence on what of the module could be meant."""
    names = [
        name
        for name, value in vars(module).items()
        if isinstance(value, nn.Module)
        or (callable(value) and getattr(value, "__module__", None) == module.__name__)
    ]
    return f"It has: {', '.join(names)}." if names else f"{place} holds no model, class or function."


def tensor_of(text: str) -> torch.Tensor:
    """A tensor of `1x3x64x64` or `1x20:int64`: standard normal numbers, or zeros where they are integers:
    those are token ids in every vocabulary."""
    found = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\w+))?", text)
    if found is None or (found[2] or "float32") not in DTYPES:
        raise NotFoundError(
            f"An input is written as sizes and, unless it is float32, a type of {', '.join(DTYPES)}: "
            f"1x3x64x64, or 1x20:int64; got '{text}'."
        )
    sizes, dtype = [int(size) for size in found[1].split("x")], DTYPES[found[2] or "float32"]
    return torch.randn(sizes).to(dtype) if dtype.is_floating_point else torch.zeros(sizes, dtype=dtype)
