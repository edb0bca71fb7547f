"""What a module computes on a batch, outputs, gradients, buffers and all, and the same for its traced graph."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from planner.frontend.lower import TracedModel

Tensors = tuple[torch.Tensor, ...]
Keywords = Mapping[str, torch.Tensor]
SEED = 3


def observe(module: nn.Module, inputs: Tensors, keywords: Keywords, owner: nn.Module | None = None) -> dict[str, Any]:
    """Run a module forward and backward from a fixed seed; return everything that can be seen afterwards.

    Args:
        module: what is called.
        inputs: by position; they are not changed.
        keywords: by name; see above.
        owner: whose parameters and buffers are looked at; the called module by default.

    Returns:
        By name: outputs, inputs behind the call, gradients of inputs and parameters, buffers, the
        state of the random generator, and the types of nested results.
    """
    owner = module if owner is None else owner
    owner.zero_grad()
    leaves = {str(i): _leaf(x) for i, x in enumerate(inputs)} | {name: _leaf(x) for name, x in keywords.items()}
    given = {name: leaf.clone() for name, leaf in leaves.items()}  # so that the module may write into its inputs
    torch.manual_seed(SEED)
    result = module(*(given[str(i)] for i in range(len(inputs))), **{name: given[name] for name in keywords})
    found = dict(_flat(result, "output"))
    outputs = [x for x in found.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(SEED)
    torch.autograd.backward(outputs, [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs])
    found |= {f"input {name}": x.detach() for name, x in given.items()}
    found |= {f"gradient of input {name}": x.grad for name, x in leaves.items()}
    found |= {f"gradient of {name}": p.grad for name, p in owner.named_parameters()}
    found |= {f"buffer {name}": b.clone() for name, b in owner.named_buffers()}
    return found | {"random state": torch.get_rng_state()}


def observe_graph(traced: TracedModel, module: nn.Module, inputs: Tensors, keywords: Keywords) -> dict[str, Any]:
    """Run a traced graph, bound to a module, forward and backward; see ``observe``."""
    return observe(fx.GraphModule(module, traced.graph), inputs, keywords, module)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return what is not the same in two results of ``observe``, bit for bit."""
    alone = [f"only one has {name}" for name in sorted(found.keys() ^ wanted.keys())]
    return alone + [name for name in wanted if name in found and not _is_same(found[name], wanted[name])]


def _is_same(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return bool(a == b)
    same_kind = (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad)
    return same_kind and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def _leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point())


def _flat(result: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a result by path, and the type of everything else."""
    if isinstance(result, Mapping):
        yield f"type of {path}", list(result)
        for key, value in result.items():
            yield from _flat(value, f"{path}.{key}")
    elif isinstance(result, tuple | list):
        yield f"type of {path}", (type(result), len(result))
        for i, value in enumerate(result):
            yield from _flat(value, f"{path}.{i}")
    else:
        yield path, result
