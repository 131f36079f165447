"""Reading methods: which chains may be fused, why others may not, and when source is not to be believed."""

from __future__ import annotations

import importlib.util
import inspect
import linecache
import sys
import traceback
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import interfuse
from interfuse.rewrite import source

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

pytestmark = pytest.mark.usefixtures("any_size")


HEADER = """
import functools
import torch
import torch.nn.functional as F
from torch import nn

FLAG = True

def helper(x):
    return x + 1

def same(f):
    @functools.wraps(f)
    def inner(*args):
        return f(*args)
    return inner

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.k = 2
        self.kept = []

class Net(Base):
"""

# A forward's body, and how many calls become one (0: none of it), with a part of the reason for what is left.
FUSED = {
    "nested": ("return self.pool(self.act(self.conv(x)))", 3, "is returned"),
    "methods": ("return F.max_pool2d(self.conv(x).relu(), kernel_size=2, stride=self.k)", 3, ""),
    "statements": ("x = self.conv(x)\nx = self.act(x)\nx = self.pool(x)\nreturn x", 3, ""),
    "other names": ("a = self.conv(x)\nb = F.relu(a)\nc = self.pool(b)\nreturn c", 3, ""),
    "annotated": ("a: torch.Tensor = self.conv(x)\na = F.relu(a, inplace=True)\nreturn a.flatten(1)", 2, ""),
    "deep in an expression": ("x = self.conv(x)\nreturn 1 + 2 * helper(F.relu(x))", 2, "goes into helper"),
    "in a branch": ("if self.training:\n    x = self.conv(x)\n    x = F.relu(x)\nreturn x", 2, ""),
    "in a loop": ("for m in (self.conv, self.conv2):\n    x = self.act(m(x))\nreturn x", 2, ""),
    "by local name": ("conv = self.conv\nact = self.act\nreturn act(conv(x))", 2, ""),
    "in a with": ("with torch.no_grad():\n    x = self.conv(x)\n    x = self.act(x)\nreturn x", 2, ""),
    "in a comprehension": ("return sum([F.relu(c(x)) for c in [self.conv]])", 2, ""),
    "nested in a try": ("try:\n    return F.relu(self.conv(x))\nfinally:\n    x = None", 2, ""),
    "redefined in a loop": ("for _ in range(2):\n    y = self.conv(x)\n    y = F.relu(y)\nreturn y", 2, ""),
    "read twice": ("y = self.conv(x)\nreturn F.relu(y) + y.mean()", 1, "read 2 times"),
    "read later": ("y = self.conv(x)\nz = F.relu(y)\nreturn z + y", 1, "also read in line"),
    "another statement between": (
        "y = self.conv(x)\nprint(x.shape)\ny = F.relu(y)\nreturn y",
        1,
        "only later",
    ),
    "shape is read": ("y = self.conv(x)\nreturn F.max_pool2d(y, y.shape[2])", 1, "read 2 times"),
    "another call first": (
        "y = self.conv(x)\nreturn helper(x).mean() + F.relu(y)",
        1,
        "other calls run before",
    ),
    "in a condition": ("y = self.conv(x)\nreturn F.relu(y) if FLAG else None", 1, "other calls run before"),
    "closure": ("y = self.conv(x)\ny = F.relu(y)\nf = lambda: y\nreturn f()", 1, "inner function"),
    "try": (
        "try:\n    x = self.conv(x)\n    x = F.relu(x)\nexcept ValueError:\n    return x\nreturn x",
        1,
        "try",
    ),
    "locals": ("x = self.conv(x)\nx = F.relu(x)\nreturn locals()['x']", 1, "by other means"),
    "global": ("global FLAG\nFLAG = self.conv(x)\nFLAG = F.relu(FLAG)\nreturn FLAG", 1, "global or nonlocal"),
    "stored": ("self.y = self.conv(x)\nreturn F.relu(self.y)", 1, "stored as self.y"),
    "walrus": ("return F.relu(y := self.conv(x)) + y", 1, "goes into"),
    "appended": ("y = self.conv(x)\nself.kept.append(y)\nreturn F.relu(y)", 1, "inside another statement"),
    "deleted": ("y = self.conv(x)\nz = F.relu(y)\ndel y\nreturn z", 1, "also read elsewhere"),
    "conditional store": ("y = x\nif FLAG:\n    y = self.conv(x)\nreturn F.relu(y)", 1, "read only later"),
    "augmented": ("x = self.conv(x)\nx += F.relu(x)\nreturn x", 1, "also read in line"),
    "indices": ("y = self.conv(x)\nreturn F.max_pool2d(y, 2, return_indices=True)[0]", 1, "indices"),
    "dilated": ("return F.max_pool2d(self.conv(x), 2, 1, 0, 2)", 1, "has dilation 2"),
    "unknown function": ("return helper(self.conv(x))", 1, "no activation or pool"),
    "computed argument": ("return F.max_pool2d(self.conv(x), max(1, 2))", 1, "computed in the call"),
    "batch": ("return torch.cat([F.relu(self.conv(x))])", 2, "goes into"),
    "pool before another activation": (
        "return torch.tanh(self.pool(self.conv(x)))",
        2,
        "no activation or pool",
    ),
    "average before the activation": (
        "return F.relu(F.avg_pool2d(self.conv(x), 2))",
        2,
        "no activation or pool",
    ),
}
NOT_A_SITE = {
    "keyword": ("return F.relu(self.conv(input=x))", "more than one value"),
    "computed callee": ("return F.relu(getattr(self, 'con' + 'v')(x))", "no direct call of it is seen"),
    "not called": ("return x", "no direct call of it is seen"),
    "handed on": ("return self.act(torch.utils.checkpoint.checkpoint(self.conv, x))", "no direct call"),
}


def module_from(tmp_path: Path, text: str, name: str = "a_model") -> ModuleType:
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def net(tmp_path: Path, body: str) -> Any:
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    torch.manual_seed(0)
    return module_from(tmp_path, f"{HEADER}    def forward(self, x):\n{lines}").Net()


def run(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


@pytest.mark.parametrize(("body", "length", "reason"), FUSED.values(), ids=FUSED.keys())
def test_chains(tmp_path: Path, body: str, length: int, reason: str) -> None:
    model = net(tmp_path, body)
    x = torch.randn(2, 4 if "conv2" in body else 3, 8, 8)
    if "conv2" in body:
        model.conv = nn.Conv2d(4, 4, 3, padding=1)
    expected = run(model, x)
    interfuse.optimize(model)
    row = next(r for r in interfuse.explain(model).rows if r.site.startswith("conv"))
    assert row.fused is (length > 1)
    assert len(row.calls.split(" -> ")) == length
    if not row.fused:
        assert reason in row.reason
    torch.testing.assert_close(run(model, x), expected)
    model.train()
    torch.testing.assert_close(run(model, x), run(interfuse.restore(model), x))


@pytest.mark.parametrize(("body", "reason"), NOT_A_SITE.values(), ids=NOT_A_SITE.keys())
def test_calls_that_are_not_sites(tmp_path: Path, body: str, reason: str) -> None:
    model = net(tmp_path, body)
    before = dict(model.__dict__)
    interfuse.optimize(model)
    assert model.__dict__ == before
    row = next(r for r in interfuse.explain(model).rows if r.site == "conv")
    assert reason in row.reason
    assert "forward of Net" in row.reason or "line" in row.reason


UNREADABLE = {
    "decorated": ("    @same\n    def forward(self, x):\n        return F.relu(self.conv(x))\n", "decorator"),
    "generator": ("    def forward(self, x):\n        yield F.relu(self.conv(x))\n", "generator"),
    "lambda": ("    forward = lambda self, x: F.relu(self.conv(x))\n", "not a def"),
    "partial": ("    forward = functools.partial(helper)\n", "not a plain Python function"),
}


@pytest.mark.parametrize(("text", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_methods_that_cannot_be_read(tmp_path: Path, text: str, reason: str) -> None:
    model = module_from(tmp_path, HEADER + text).Net()
    interfuse.optimize(model)
    assert "forward" not in model.__dict__
    row = next(r for r in interfuse.explain(model).rows if r.site == "conv")
    assert reason in row.reason


def test_source_changed_after_the_import(tmp_path: Path) -> None:
    body = "return F.relu(self.conv(x))"
    model = net(tmp_path, body)
    path = tmp_path / "a_model.py"
    text = path.read_text()
    for changed in (text.replace("F.relu", "torch.tanh"), "\n\n" + text, "def broken(:\n" + text, "x = 1\n"):
        path.write_text(changed)
        linecache.clearcache()
        source.forget()
        found = source.read(type(model).forward)
        assert isinstance(found, str), changed
    path.write_text(text)
    linecache.clearcache()
    source.forget()
    assert not isinstance(source.read(type(model).forward), str)


def test_code_without_a_file() -> None:
    names: dict[str, Any] = {}
    exec(f"{HEADER}    def forward(self, x):\n        return F.relu(self.conv(x))\n", names)
    model = names["Net"]()
    interfuse.optimize(model)
    row = next(r for r in interfuse.explain(model).rows if r.site == "conv")
    assert "source cannot be found" in row.reason


def test_private_names_super_and_closures(tmp_path: Path) -> None:
    text = (
        HEADER.replace("class Net(Base):", "def make(scale):\n  class _Net(Base):").replace("FLAG", "_FLAG")
        + """
    def __init__(self):
        super().__init__()
        self.__own = nn.Conv2d(4, 4, 1)
    def helper(self, x):
        return x
    def forward(self, x, *, twice=2, **more):
        '''Documented.

  Even out of line.'''
        x = self.act(self.conv(x)) * scale
        x = super().extra_repr() or F.relu(self.__own(x))
        return x * twice
  return _Net
"""
    )
    model = module_from(tmp_path, text).make(3.0)()
    x = torch.randn(1, 3, 4, 4)
    expected = model(x, twice=4)
    interfuse.optimize(model)
    assert sorted(row.site for row in interfuse.explain(model).fused) == ["_Net__own", "conv"]
    torch.testing.assert_close(model(x, twice=4), expected)
    assert str(inspect.signature(model.forward)) == "(x, *, twice=2, **more)"
    with pytest.raises(TypeError):
        model(x, 4)


def test_a_traceback_names_the_line_of_the_source(tmp_path: Path) -> None:
    model = net(tmp_path, "x = self.conv(x)\nx = F.relu(x)\nreturn x.no_such_thing")
    interfuse.optimize(model)
    try:
        model(torch.randn(1, 3, 4, 4))
    except AttributeError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        assert last.line == "return x.no_such_thing"
    else:
        pytest.fail("an attribute that does not exist was read")


def test_an_inherited_forward_and_one_that_a_subclass_replaces(tmp_path: Path) -> None:
    text = (
        HEADER
        + """    def forward(self, x):
        return F.relu(self.conv(x))

class Child(Net):
    pass

class Replaced(Net):
    def forward(self, x):
        return super().forward(x) + self.conv(x)
"""
    )
    module = module_from(tmp_path, text)
    x = torch.randn(1, 3, 4, 4)
    for cls, sites in ((module.Child, ["conv"]), (module.Replaced, [])):
        model = cls()
        expected = model(x)
        interfuse.optimize(model)
        assert [row.site for row in interfuse.explain(model).fused] == sites
        torch.testing.assert_close(model(x), expected)


def test_a_pickle_whose_source_has_changed_runs_the_new_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    body = "{}    def forward(self, x):\n        return {}(self.conv(x))\n"
    module = module_from(tmp_path, body.format(HEADER, "F.relu"), "b_model")
    monkeypatch.setitem(sys.modules, "b_model", module)
    model = interfuse.optimize(module.Net())
    saved = pickle.dumps(model)
    (tmp_path / "b_model.py").unlink()
    linecache.clearcache()
    module = module_from(tmp_path, body.format(HEADER, "F.gelu"), "b_model")
    monkeypatch.setitem(sys.modules, "b_model", module)
    loaded = pickle.loads(saved)
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(loaded(x), F.gelu(loaded.conv(x)))
    (row,) = [r for r in interfuse.explain(loaded).rows if r.site == "conv"]
    assert not row.fused
    assert "optimise it again" in row.reason
    interfuse.restore(loaded)
    interfuse.optimize(loaded)
    torch.testing.assert_close(loaded(x), F.gelu(loaded.conv(x)))
    assert [r.site for r in interfuse.explain(loaded).fused] == ["conv"]
