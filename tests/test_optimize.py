"""optimize() on whole models: the same answers and gradients, the same model otherwise, and all of it
undone."""

from __future__ import annotations

import copy
import io
import pickle
import re
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from explained import rows
from models_zoo import ZOO, Entry
from torch import Tensor, nn

import interfuse
from interfuse import _native
from interfuse.rewrite.bound import Bound
from interfuse.rewrite.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("any_size")


BY_NAME = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO.keys())


def fused_names(model: nn.Module) -> list[str]:
    return sorted(row.site for row in interfuse.explain(model).fused)


def step(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of every parameter and input, with a fixed random state."""
    torch.manual_seed(1)
    inputs = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs)
    leaves = [*(p for p in model.parameters() if p.requires_grad), *(t for t in inputs if t.requires_grad)]
    y = model(*inputs)
    grads = torch.autograd.grad(
        (y * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum(), leaves, allow_unused=True
    )
    return y.detach(), [torch.zeros(()) if g is None else g for g in grads]


def assert_close(got: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    # Both round in float32, in another order; the values are of the order of one.
    for a, b in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()) + 1e-6)


class Calls:
    """Counts fused calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count = 0
        from interfuse.rewrite.conv_pool import ConvPool

        run = ConvPool.run

        def counted(pattern: ConvPool, call: Any) -> Tensor:
            self.count += 1
            return run(pattern, call)

        monkeypatch.setattr(ConvPool, "run", counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@BY_NAME
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_answers_and_restored(entry: Entry, training: bool, calls: Calls) -> None:
    model, inputs = entry.build()
    model.train(training)
    modules = {name: dict(module.__dict__) for name, module in model.named_modules()}
    state, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    expected = step(model, inputs)
    model.load_state_dict(state)  # running statistics moved

    assert interfuse.optimize(model) is model
    assert fused_names(model) == sorted(entry.fused)
    left = {row.site: row.reason for row in interfuse.explain(model).rows if not row.fused}
    for site, reason in entry.left.items():
        assert reason in left[site]
    assert calls.count == 0
    assert_close(step(model, inputs), expected)
    assert calls.count > 0
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)

    interfuse.restore(model)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == modules[name].keys()
        assert not any(isinstance(value, Bound) for value in module.__dict__.values())
    calls.count = 0
    again = step(model, inputs)
    assert calls.count == 0
    assert torch.equal(again[0], expected[0])


@BY_NAME
def test_twice_is_once(entry: Entry) -> None:
    model, _ = entry.build()
    interfuse.optimize(model)
    once = [[type(v) for v in m.__dict__.values() if isinstance(v, Bound)] for m in model.modules()]
    sites = [
        id(s)
        for m in model.modules()
        for b in m.__dict__.values()
        if isinstance(b, Bound)
        for s in b.sites.values()
    ]
    interfuse.optimize(model)
    assert [[type(v) for v in m.__dict__.values() if isinstance(v, Bound)] for m in model.modules()] == once
    assert sites == [
        id(s)
        for m in model.modules()
        for b in m.__dict__.values()
        if isinstance(b, Bound)
        for s in b.sites.values()
    ]


@BY_NAME
def test_deepcopy_and_pickle(entry: Entry, calls: Calls, request: pytest.FixtureRequest) -> None:
    model, inputs = entry.build()
    model.eval()
    interfuse.optimize(model)
    copies = [copy.deepcopy(model)]
    if "hooked" not in request.node.name:  # a parametrised module does not pickle
        copies.append(pickle.loads(pickle.dumps(model)))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
    expected = step(model, inputs)
    made = calls.count
    interfuse.restore(model)
    for other in copies:
        calls.count = 0
        assert_close(step(other, inputs), expected)
        assert calls.count == made
        for module in other.modules():
            for bound in (v for v in module.__dict__.values() if isinstance(v, Bound)):
                assert bound.owner is module
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert not torch.equal(step(other, inputs)[0], expected[0])
        interfuse.restore(other)
        assert fused_names(other) == []
    assert_close(step(model, inputs), expected)


@BY_NAME
def test_state_dict_loads_both_ways(entry: Entry) -> None:
    model, inputs = entry.build()
    torch.manual_seed(5)
    other = entry.make()
    model.eval()
    other.eval()
    expected = step(other, inputs)
    interfuse.optimize(model).load_state_dict(other.state_dict())
    assert_close(step(model, inputs), expected)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_a_class_whose_forward_is_replaced_later(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x,) = ZOO["functional"].build()
    interfuse.optimize(model)
    monkeypatch.setattr(type(model), "forward", lambda self, x: self.pool(self.conv1(x)))
    assert model(x).shape == (2, 6, 10, 10)
    assert calls.count == 0
    assert not interfuse.explain(model).fused


def test_hooks_registered_later_are_honoured(calls: Calls) -> None:
    model, (x,) = ZOO["vgg"].build()
    model.eval()
    interfuse.optimize(model)
    model(x)
    assert calls.count == 4
    seen: list[Tensor] = []
    handle = model.features[1].register_forward_hook(lambda module, args, output: seen.append(output))
    calls.count = 0
    model(x)
    assert len(seen) == 1
    assert calls.count == 3
    row = next(r for r in interfuse.explain(model).rows if r.site == "features.0")
    assert not row.fused
    assert "ReLU, which follows, has hooks" in row.reason
    handle.remove()
    calls.count = 0
    model(x)
    assert calls.count == 4
    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(output)
    ):
        calls.count = 0
        model(x)
        assert calls.count == 0
    assert len(seen) > 10


def test_changes_after_optimize_are_honoured(calls: Calls) -> None:
    model, (x,) = ZOO["functional"].build()
    model.eval()
    interfuse.optimize(model)
    model.pool = nn.AvgPool2d(2, 2)
    plain = copy.deepcopy(model)
    interfuse.restore(plain)
    calls.count = 0
    torch.testing.assert_close(model(x), plain(x))
    assert calls.count == 3

    class Doubled(nn.MaxPool2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.pool = plain.pool = Doubled(2, 2)
    model.conv2 = plain.conv2 = nn.Conv2d(6, 8, 3, padding_mode="reflect")
    calls.count = 0
    torch.testing.assert_close(model(x), plain(x))
    assert calls.count == 2
    model.conv3 = plain.conv3 = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
    torch.testing.assert_close(model(x), plain(x))
    model.double()
    torch.testing.assert_close(model(x.double()), plain.double()(x.double()))


def test_what_others_put_over_it_stays() -> None:
    model, _ = ZOO["vgg"].build()
    model = interfuse.optimize(model).features
    model._old_forward = model.forward  # as accelerate does
    model.forward = lambda x: model._old_forward(x) + 1
    mine = model.forward
    assert not interfuse.explain(model).fused
    interfuse.restore(model)
    assert model.forward is mine
    interfuse.optimize(model)
    assert model.forward is mine


def test_a_sequential_may_change_its_children() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    interfuse.optimize(model)
    model.append(nn.Conv2d(4, 4, 1))
    model.append(nn.ReLU())
    model[1] = nn.Identity()
    x = torch.randn(2, 3, 8, 8)
    plain = nn.Sequential(*model)
    torch.testing.assert_close(model(x), plain(x))
    del model[2]
    plain = nn.Sequential(*model)
    torch.testing.assert_close(model(x), plain(x))


def test_control_flow_stays_alive() -> None:
    model, (x,) = ZOO["control_flow"].build()
    plain = copy.deepcopy(model)
    interfuse.optimize(model)
    for training in (True, False):
        for small in (True, False):
            model.train(training)
            plain.train(training)
            torch.testing.assert_close(model(x, small), plain(x, small=small))
    assert model.calls == plain.calls == 4
    y = model(x)
    y.sum().backward()
    assert model.frozen.weight.grad is None  # the no_grad block is still one


def test_a_model_that_stores_a_value_still_stores_it() -> None:
    model, (x,) = ZOO["residual"].build()
    interfuse.optimize(model)
    model(x)
    assert model.stash is not None


@pytest.mark.parametrize("name", ["vgg", "functional", "c3d", "siamese", "control_flow", "text_cnn"])
def test_compile_and_export(name: str) -> None:
    model, inputs = ZOO[name].build()
    model.eval()
    expected = model(*inputs)
    interfuse.optimize(model)
    compiled = torch.compile(model, fullgraph=name != "control_flow", backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-5)
    if name == "control_flow":  # counts its calls, which an exported program cannot
        return
    for strict in (False, True):
        exported = torch.export.export(model, inputs, strict=strict)
        assert any("interfuse" in str(node.target) for node in exported.graph.nodes)
        torch.testing.assert_close(exported.module()(*inputs), expected, rtol=1e-4, atol=1e-5)
        assert set(exported.state_dict) == set(model.state_dict())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_tracers_see_plain_modules() -> None:
    model, (x,) = ZOO["vgg"].build()
    model.eval()
    expected = model(x)
    interfuse.optimize(model)
    for traced in (torch.fx.symbolic_trace(model), torch.jit.trace(model, (x,))):
        torch.testing.assert_close(traced(x), expected)
        assert "interfuse" not in str(traced.graph)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_opaque_models_are_left_alone() -> None:
    model, (x,) = ZOO["vgg"].build()
    model.eval()
    for wrap, reason in (
        (torch.fx.symbolic_trace, "torch.fx graph"),
        (lambda m: torch.jit.trace(m, (x,)), "TorchScript"),
        (lambda m: torch.compile(m, backend="eager"), "compiled"),
    ):
        wrapped = wrap(model)
        expected = wrapped(x)
        interfuse.optimize(wrapped)
        assert torch.equal(wrapped(x), expected)
        (row,) = interfuse.explain(wrapped).rows
        assert reason in row.reason
        assert not row.fused


def test_other_tensors_run_plainly(calls: Calls) -> None:
    class Mine(Tensor):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    interfuse.optimize(model)
    x = torch.randn(2, 3, 8, 8)
    assert isinstance(model(x.as_subclass(Mine)), Mine)
    assert calls.count == 0
    torch.testing.assert_close(model(x[0]), model(x)[0])  # unbatched
    with pytest.raises(RuntimeError, match="channels"):  # torch's own words for a wrong input
        model(torch.randn(2, 5, 8, 8))


def test_autocast_and_func(calls: Calls) -> None:
    model, (x,) = ZOO["vgg"].build()
    model.eval()
    plain = copy.deepcopy(model)
    interfuse.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = model(x), plain(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)
    parameters = {name: 2 * p for name, p in plain.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(model, parameters, (x,)),
        torch.func.functional_call(plain, parameters, (x,)),
    )
    assert calls.count == 8


def test_errors_and_no_ops() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module; got int"):
        interfuse.optimize(3)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="tuple or list of positional arguments"):
        interfuse.optimize(nn.ReLU(), 3)  # type: ignore[arg-type]
    model = nn.LayerNorm(2)
    before = dict(model.__dict__)
    assert interfuse.restore(model) is model
    assert interfuse.optimize(model) is model
    assert model.__dict__ == before
    assert "no module that interfuse has a fused op for" in str(interfuse.explain(model))


def test_sites_do_not_hold_tensors() -> None:
    model, (x,) = ZOO["vgg"].build()
    interfuse.optimize(model)
    model(x)
    bound = model.features.__dict__["forward"]
    for site in bound.sites.values():
        assert isinstance(site, Site)
        assert not [v for v in pickle.loads(pickle.dumps(site)).__dict__.values() if isinstance(v, Tensor)]
        assert site.seen is not None


def test_the_documentation_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs" / "optimize.md").read_text()
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    runpy.run_path(str(script))
    assert "BatchNorm2d follows" in " ".join(capsys.readouterr().out.split())


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp root", "fsdp each"])
def test_data_parallel(wrapper: str, group: None, calls: Calls) -> None:
    model, (x,) = ZOO["functional"].build()
    model.eval()
    plain = copy.deepcopy(model)
    interfuse.optimize(model)
    if wrapper == "ddp":
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import init_device_mesh

        mesh = init_device_mesh("cpu", (1,))
        if wrapper == "fsdp each":
            for child in (model.conv1, model.conv2, model.conv3):
                fully_shard(child, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    y, expected = wrapped(x), plain(x)
    assert calls.count == (0 if wrapper == "fsdp each" else 3)  # sharding each puts hooks on each
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    expected.sum().backward()
    for p, q in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(grad, q.grad, rtol=1e-3, atol=1e-5)


def test_the_reasons_read_well() -> None:
    """Of kernels, and of what torch's own modules call."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(2), nn.Conv1d(32, 8, 3), nn.Tanh(),
        nn.TransformerEncoderLayer(782, 2, 16, batch_first=True),
    )  # fmt: skip
    interfuse.optimize(model.eval(), torch.randn(1, 3, 32, 32), seconds=0.01)
    interfuse.optimize(interfuse.restore(model))
    model(torch.randn(1, 3, 32, 32))
    found = rows(model)
    units = _native.info()["matrix_units"]
    kernel, last = ("matrix", "saved)") if units else ("direct", "INTERFUSE_ISA forbids them)")
    assert found["0"].kernel.startswith(f"native, {kernel} (not winograd: a group has 3 input")
    assert found["0"].kernel.endswith(last)
    assert found["4"].kernel == "native, direct"
    linear = "it is called by torch's own TransformerEncoderLayer, whose methods are left as they are"
    assert found["6.linear1"].reason == found["6.linear2"].reason == linear
    assert ".;" not in str(interfuse.explain(model))
