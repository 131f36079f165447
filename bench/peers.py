"""The providers that a benchmark compares: interfuse and every peer, all built from the same torch module.

A peer that is not installed, or that cannot run a case, says so in a sentence; it never drops out in silence.
Nothing here is imported by interfuse itself: the peers are the `bench` extra, not dependencies.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib.metadata
import importlib.util
import sys
from typing import TYPE_CHECKING, Any, Protocol

import torch
from interfuse.bench.workers import sample
from torch import Tensor, nn

import interfuse
from interfuse import memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from interfuse.bench.roofline import Cost


class Workload(Protocol):
    """One case of one op, as every provider gets it."""

    name: str
    dtype: torch.dtype
    channels_last: torch.memory_format | None  # None where torch has no such format for these inputs
    gradients: Sequence[str]  # names of what `Built.train` returns first
    mask: Tensor | None  # what of the output counts, where that is not all of it

    def why_not(self, provider: str) -> str | None: ...
    def describe(self) -> dict[str, Any]: ...
    def cost(self, training: bool) -> Cost: ...
    def module(self) -> nn.Module: ...
    def inputs(self) -> list[Tensor]: ...
    def tiny(self) -> Workload: ...
    def ours(self, module: nn.Module) -> nn.Module: ...
    def onnx(self, module: nn.Module) -> bytes: ...
    def overhead(self, seconds: float, threads: int) -> dict[str, float]: ...


@dataclasses.dataclass
class Built:
    """A provider ready to run: `infer` returns what `tensor` turns into a torch tensor; `train` returns the
    gradients of all inputs and then of all parameters."""

    infer: Callable[[], Any]
    tensor: Callable[[Any], Tensor] = lambda y: y
    train: Callable[[], Sequence[Tensor]] | None = None
    # What must outlive the closures, such as pinned buffers.
    keep: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Provider:
    name: str
    package: str  # its distribution, for the version and for the sentence when it is missing
    build: Callable[[Workload, int], Built]
    ours: bool = False
    trains: bool = True
    layout: str = "contiguous"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    weights: torch.dtype | None = None  # where they are coarser than the case's dtype
    needs: tuple[str, ...] = ()

    def why_not(self, workload: Workload) -> str | None:
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed here; `pip install 'interfuse[bench]'` brings it."
        if self.layout == "channels_last" and workload.channels_last is None:
            return "torch has no channels_last format for these inputs."
        if workload.dtype not in self.dtypes:
            dtype = str(workload.dtype).removeprefix("torch.")
            return f"{self.name} does not run this in {dtype} on the CPU."
        return workload.why_not(self.name)


def torch_built(workload: Workload, module: nn.Module, inputs: Sequence[Tensor]) -> Built:
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted = [*(leaf for leaf in leaves if leaf.requires_grad), *module.parameters()]
    with torch.no_grad():
        # The gradient that comes back has the layout of the output, as it would from a layer behind this one.
        y = module(*inputs)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(workload.dtype)
        grad_y = torch.empty_like(y).copy_(masked(workload, grad))

    def train() -> Sequence[Tensor]:
        return torch.autograd.grad(module(*leaves), wanted, grad_y)

    return Built(infer=lambda: module(*inputs), tensor=lambda y: masked(workload, y), train=train)


def masked(workload: Workload, y: Tensor) -> Tensor:
    return y if workload.mask is None else y * workload.mask


def prepared(workload: Workload, channels_last: bool) -> tuple[nn.Module, list[Tensor]]:
    module, inputs = workload.module(), workload.inputs()
    if channels_last and workload.channels_last is not None:
        module = module.to(memory_format=workload.channels_last)
        dimensions = 5 if workload.channels_last is torch.channels_last_3d else 4
        inputs = [
            x.contiguous(memory_format=workload.channels_last) if x.dim() == dimensions else x for x in inputs
        ]
    return module, inputs


def eager(workload: Workload, threads: int) -> Built:
    return torch_built(workload, *prepared(workload, channels_last=False))


def torch_fused(workload: Any, threads: int) -> Built:
    """What torch has of its own for the whole of it."""
    module, inputs = prepared(workload, channels_last=False)
    return torch_built(workload, workload.torch_fused(module), inputs)


def eager_channels_last(workload: Workload, threads: int) -> Built:
    return torch_built(workload, *prepared(workload, channels_last=True))


def compiled(workload: Workload, threads: int) -> Built:
    module, inputs = prepared(workload, channels_last=False)
    return torch_built(workload, torch.compile(module, dynamic=False), inputs)


def compiled_channels_last(workload: Workload, threads: int) -> Built:
    module, inputs = prepared(workload, channels_last=True)
    return torch_built(workload, torch.compile(module, dynamic=False), inputs)


def compiled_frozen(workload: Workload, threads: int) -> Built:
    """torch.compile with the parameters frozen into the graph: inductor then packs the weights for oneDNN."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    module, inputs = prepared(workload, channels_last=True)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    run = torch.compile(module.eval(), dynamic=False)
    return Built(infer=lambda: run(*inputs))


def ours(workload: Workload, threads: int) -> Built:
    module, inputs = prepared(workload, channels_last=False)
    return torch_built(workload, workload.ours(module), inputs)


def ours_channels_last(workload: Workload, threads: int) -> Built:
    module, inputs = prepared(workload, channels_last=True)
    return torch_built(workload, workload.ours(module), inputs)


def ours_optimized(workload: Any, threads: int) -> Built:
    """The peers' own module, through optimize()."""
    module, inputs = prepared(workload, channels_last=False)
    return torch_built(workload, workload.ours_optimized(module), inputs)


def ours_highest(workload: Workload, threads: int) -> Built:
    interfuse.set_precision("highest")
    return ours(workload, threads)


def ours_half_weights(workload: Any, threads: int) -> Built:
    module, inputs = prepared(workload, channels_last=False)
    return dataclasses.replace(
        torch_built(workload, workload.ours_half_weights(module.eval()), inputs), train=None
    )


def ours_padded(workload: Any, threads: int) -> Built:
    """The padding of ragged sequences computed like the rest."""
    module, inputs = prepared(workload, channels_last=False)
    return torch_built(workload, workload.ours_padded(module), inputs)


def ours_int8_weights(workload: Any, threads: int) -> Built:
    module, inputs = prepared(workload, channels_last=False)
    return dataclasses.replace(
        torch_built(workload, workload.ours_int8_weights(module.eval()), inputs), train=None
    )


def onnxruntime(workload: Workload, threads: int) -> Built:
    import onnxruntime as ort

    module, inputs = prepared(workload, channels_last=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # ONNX Runtime has operators of its own beside ONNX's, which are faster where a workload can use them.
    graph = getattr(workload, "onnx_with_own_operators", workload.onnx)(module)
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    # Bound buffers spare it the allocation and the copy of the output at every call.
    binding = session.io_binding()
    arrays = [x.numpy() for x in inputs]
    for i, array in enumerate(arrays):
        binding.bind_cpu_input(session.get_inputs()[i].name, array)
    with torch.no_grad():
        out = torch.empty(module(*inputs).shape)
    value = ort.OrtValue.ortvalue_from_numpy(out.numpy())
    binding.bind_ortvalue_output(session.get_outputs()[0].name, value)
    return Built(
        infer=lambda: session.run_with_iobinding(binding),
        tensor=lambda _: torch.from_numpy(value.numpy().copy()),
        keep=[arrays, out],
    )


def openvino(workload: Workload, threads: int) -> Built:
    import openvino as ov

    module, inputs = prepared(workload, channels_last=False)
    core = ov.Core()
    # Its default precision on a CPU with bf16 units is bfloat16, which would be another computation.
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(
        core.read_model(workload.onnx(module)), "CPU", settings
    ).create_infer_request()
    arrays = [x.numpy() for x in inputs]
    for i, array in enumerate(arrays):
        request.set_input_tensor(i, ov.Tensor(array, shared_memory=True))
    return Built(
        infer=request.infer,
        tensor=lambda _: torch.from_numpy(request.get_output_tensor(0).data.copy()),
        keep=[arrays],
    )


_F32 = (torch.float32,)
_ONNX = ("onnx",)
PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in [
        Provider("interfuse", "interfuse", ours, ours=True),
        Provider("interfuse_channels_last", "interfuse", ours_channels_last, ours=True,
                 layout="channels_last"),
        Provider("interfuse_highest", "interfuse", ours_highest, ours=True, dtypes=_F32),
        Provider("interfuse_optimized", "interfuse", ours_optimized, ours=True),
        Provider("interfuse_half_weights", "interfuse", ours_half_weights, ours=True, trains=False,
                 dtypes=_F32, weights=torch.bfloat16),
        Provider("interfuse_padded", "interfuse", ours_padded, ours=True),
        Provider("interfuse_int8_weights", "interfuse", ours_int8_weights, ours=True, trains=False,
                 dtypes=_F32, weights=torch.int8),
        Provider("eager", "torch", eager),
        Provider("torch_fused", "torch", torch_fused),
        Provider("channels_last", "torch", eager_channels_last, layout="channels_last"),
        Provider("compile", "torch", compiled),
        Provider("compile_channels_last", "torch", compiled_channels_last, layout="channels_last"),
        Provider("compile_frozen", "torch", compiled_frozen, trains=False),
        Provider("onnxruntime", "onnxruntime", onnxruntime, trains=False, dtypes=_F32,
                 needs=("onnxruntime", *_ONNX)),
        Provider("openvino", "openvino", openvino, trains=False, dtypes=_F32, needs=("openvino", *_ONNX)),
    ]
}  # fmt: skip


def built_here(workload: Workload, provider: str) -> Built:
    """In this process, for pytest-benchmark: torch's providers share its pool of threads, so none spins
    beside another."""
    import pytest

    chosen = PROVIDERS[provider]
    reason = chosen.why_not(workload)
    if reason:
        pytest.skip(reason)
    return chosen.build(workload, torch.get_num_threads())


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error; infinite where a NaN stands that the truth does not have."""
    difference = (value.detach().double() - truth).norm() / truth.norm().clamp_min(1e-300)
    return float(torch.nan_to_num(difference, nan=float("inf")))


def truth(workload: Workload, train: bool) -> dict[str, Any]:
    """The float64 answer from torch, which everybody's error is measured against."""
    inputs = [x.double() if x.is_floating_point() else x for x in workload.inputs()]
    built = torch_built(workload, workload.module().double(), inputs)
    with torch.no_grad():
        output = built.tensor(built.infer())
    return {"output": output, "gradients": list(built.train()) if train and built.train else []}


# Far above rounding and far below any wrong index: nothing is timed whose answer is wrong.
WRONG = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.int8: 3e-2}


class Session:
    """The worker's end: one provider on one workload, and the commands that it answers."""

    def __init__(self, workload: Workload, provider: Provider, threads: int) -> None:
        self.workload, self.provider, self.threads = workload, provider, threads
        torch.set_num_threads(threads)
        self._built: Built | None = None

    def prepare(self) -> dict[str, Any]:
        reason = self.provider.why_not(self.workload)
        return (
            {"why_not": reason} if reason else {"version": importlib.metadata.version(self.provider.package)}
        )

    def command(self, command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "build":
                return self.build(command["truth"], command["train"])
            case "inference":
                with torch.no_grad():
                    return sample(self.built.infer, command["seconds"])
            case "training":
                if self.built.train is None:
                    raise ValueError(f"{self.provider.name} does not train.")
                return sample(self.built.train, command["seconds"])
            case "memory":
                return self.memory()
            case "overhead":
                return self.workload.overhead(command["seconds"], self.threads)
            case other:
                raise ValueError(f"A worker knows no command '{other}'.")

    @property
    def built(self) -> Built:
        if self._built is None:
            raise ValueError("A worker is asked to build before anything is timed.")
        return self._built

    def build(self, truth_file: str, train: bool) -> dict[str, Any]:
        """Builds the provider and compares its answers with the float64 truth before anything is timed."""
        truth = torch.load(truth_file)
        self._built = built = self.provider.build(self.workload, self.threads)
        with torch.no_grad():
            errors = {"output": relative_error(built.tensor(built.infer()), truth["output"])}
        if train and built.train is not None:
            grads = zip(self.workload.gradients, built.train(), truth["gradients"], strict=False)
            errors |= {f"grad_{name}": relative_error(grad, right) for name, grad, right in grads}
        if not errors["output"] <= WRONG[self.provider.weights or self.workload.dtype]:
            return {"failed": f"its output is wrong: relative error {errors['output']:.1e} against float64."}
        return {"errors": errors}

    def memory(self) -> dict[str, Any]:
        """Peak memory of a training step above what the process held just before it, in bytes.

        The system's own high-water mark of resident memory counts everything: torch's tensors, oneDNN's
        scratch space, our packs and workspaces. A step on a tiny case comes first and loads code and starts
        threads; `first` is then the first step on the real case (what it leaves in caches counts), `later`
        the third (what the first one left in caches does not).
        """
        if not sys.platform.startswith("linux"):
            return {"why_not": "Peak memory is read from Linux's /proc, which this system does not have."}
        tiny = self.provider.build(self.workload.tiny(), self.threads)
        for _ in range(2):
            list(tiny.train() if tiny.train else [])
        del tiny
        train = self.provider.build(self.workload, self.threads).train
        if train is None:
            return {"why_not": f"{self.provider.name} does not train."}
        peaks = [peak_of(train) for _ in range(3)]
        return {"first": peaks[0], "later": peaks[2]}


def peak_of(step: Callable[[], object]) -> int:
    gc.collect()
    # Otherwise what an earlier step freed, but interfuse or malloc still holds, would hide this step's use.
    memory.release()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # sets the high-water mark to what is resident now
    before = resident()["VmRSS"]
    result = step()
    peak = resident()["VmHWM"]
    del result
    return peak - before


def resident() -> dict[str, int]:
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status if line.startswith(("VmRSS", "VmHWM")))
    return {name: int(value.split()[0]) * 1024 for name, value in fields.items()}
