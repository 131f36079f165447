"""Who is timed on a GPU: interfuse and torch's ways, each as a step on given inputs, some as CUDA graphs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from interfuse.bench.peers import Workload

Inputs = list[Tensor]  # of one call
# torch's implementations of scaled_dot_product_attention, where a workload asks for them one by one.
SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Provider:
    """A way to compute a workload on the device, with the same parameters as all others."""

    name: str
    make: Callable[[], nn.Module]
    channels_last: bool = False
    graphed: bool = False  # its steps are captured and replayed: nothing of Python or of launches is left
    around: Callable[[], Any] = field(default=nullcontext)  # a context in which it is called

    @property
    def ours(self) -> bool:
        return self.name.startswith("interfuse")


def providers(load: Workload, dtype: torch.dtype, device: str) -> list[Provider]:
    """A workload may name back ends of ours (`gpu_backends`) and ask for torch's of attention (`sdpa`)."""
    last = load.channels_last

    def module() -> nn.Module:
        return load.module().to(device, dtype)

    def in_channels_last() -> nn.Module:
        made = module()
        return made.to(memory_format=last) if last else made  # type: ignore[call-overload,no-any-return]

    def fused() -> nn.Module:
        return moved(load.ours(module()), device)

    def compiled(**options: Any) -> Callable[[], nn.Module]:
        return lambda: torch.compile(in_channels_last(), dynamic=False, **options)  # type: ignore[no-any-return]

    found = [
        Provider("interfuse", fused),
        Provider("interfuse_graph", fused, graphed=True),
        Provider("eager", module),
        Provider("eager_graph", in_channels_last, last is not None, graphed=True),
        Provider("compile", compiled(), last is not None),
        Provider("compile_graph", compiled(), last is not None, graphed=True),
        Provider("compile_max_autotune", compiled(mode="max-autotune"), last is not None),
    ]
    if last is not None:
        found += [
            Provider("interfuse_channels_last", fused, True),
            Provider("channels_last", in_channels_last, True),
        ]
    loose: Any = load  # what only some workloads have
    for backend in getattr(load, "gpu_backends", ()):

        def made(backend: str = backend) -> nn.Module:
            return moved(loose.ours_on(module(), backend), device)

        found.append(Provider(f"interfuse_{backend}", made))
        found.append(Provider(f"interfuse_{backend}_graph", made, graphed=True))
    if getattr(load, "sdpa", False):
        for name, way in SDPA.items():
            found.append(Provider(name, module, around=lambda way=way: sdpa_kernel([way])))  # type: ignore[misc]
    return [provider for provider in found if device == "cuda" or not provider.graphed]


def moved(module: nn.Module, device: str) -> nn.Module:
    """With its lengths on the device, where our kernels read them; torch packs by lengths on the CPU."""
    lengths = getattr(module, "lengths", None)
    if lengths is not None:
        module.lengths = lengths.to(device)
    return module


def rotating(load: Workload, dtype: torch.dtype, channels_last: bool, device: str) -> list[Inputs]:
    """Copies of the inputs that together are twice as large as the L2 cache, and at least two."""
    xs = [x.to(device, dtype if x.is_floating_point() else None) for x in load.inputs()]
    last = load.channels_last
    if channels_last and last:
        xs = [x.contiguous(memory_format=last) if x.dim() == _dimensions(last) else x for x in xs]
    cache = torch.cuda.get_device_properties(xs[0].device).L2_cache_size if device == "cuda" else 0
    copies = max(2, -(-2 * cache // sum(x.numel() * x.element_size() for x in xs)))
    return [[x.clone() for x in xs] for _ in range(min(copies, 64))]


def _dimensions(layout: torch.memory_format) -> int:
    return 4 if layout == torch.channels_last else 5


def training_step(module: nn.Module, inputs: Inputs) -> Callable[..., object]:
    """Forward and backward to the gradients of all inputs and parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    grad_y = torch.ones_like(module(*inputs))

    def step(*inputs: Tensor) -> object:
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        wanted = [*(leaf for leaf in leaves if leaf.requires_grad), *parameters]
        return torch.autograd.grad(module(*leaves), wanted, grad_y)

    return step


def prepared(
    provider: Provider, step: Callable[..., object], inputs: Sequence[Inputs]
) -> list[Callable[[], object]]:
    """One call for each of the inputs."""

    def call(given: Inputs) -> Callable[[], object]:
        def run() -> object:
            with provider.around():
                return step(*given)

        return run

    calls = [call(given) for given in inputs]
    return graphs(calls) if provider.graphed else calls


def graphs(calls: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    """Each call captured in a CUDA graph, in one pool of memory, since only one runs at a time."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):  # what a first call compiles, loads or tunes may not be captured
            calls[0]()
    torch.cuda.current_stream().wait_stream(beside)
    pool = torch.cuda.graph_pool_handle()

    def captured(call: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = call()

        def replay() -> object:
            graph.replay()
            return result

        return replay

    return [captured(call) for call in calls]
