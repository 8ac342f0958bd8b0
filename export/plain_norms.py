"""Batch normalizations of every kind -> torch.nn.BatchNorm, which compute the same in evaluation and can be folded."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch.nn.functional as F
import torchvision
from torch import fx, nn

from export.lower import unused_path
from qat.graph.fx_network import arguments, shapes

_BY_RANK: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def plain_norms(folded: fx.GraphModule) -> None:
    """Replaces synchronized, frozen and functional batch normalizations with known statistics in ``folded``."""
    ranks = {name: len(shape) for name, shape in shapes(folded).items()}
    for node in list(folded.graph.nodes):
        rank = ranks.get(node.name, 0)
        if node.op == "call_module":
            module: Any = folded.get_submodule(str(node.target))
            if isinstance(module, nn.SyncBatchNorm) and module.running_mean is not None:
                folded.set_submodule(str(node.target), _norm(rank, module._buffers, module._parameters, module.eps))
            elif isinstance(module, torchvision.ops.FrozenBatchNorm2d):
                folded.set_submodule(str(node.target), _norm(rank, module._buffers, module._buffers, module.eps))
        elif node.target is F.batch_norm:
            _replace_function(folded, node, rank)
    folded.recompile()


def _replace_function(folded: fx.GraphModule, node: fx.Node, rank: int) -> None:
    given = arguments(node)
    names = ("running_mean", "running_var", "weight", "bias")
    sources = [given.get(name) for name in names]
    constant = all(source is None or (isinstance(source, fx.Node) and source.op == "get_attr") for source in sources)
    if given.get("training", False) or not constant or sources[0] is None or sources[1] is None:
        return
    values = {
        name: None if source is None else attrgetter(str(source.target))(folded)
        for name, source in zip(names, sources, strict=True)
    }
    path = unused_path(folded, f"{node.name}_norm")
    folded.add_submodule(path, _norm(rank, values, values, float(given.get("eps", 1e-5))))
    node.op, node.target, node.args, node.kwargs = "call_module", path, (node.args[0],), {}


def _norm(rank: int, statistics: Any, affine: Any, epsilon: float) -> nn.Module:
    """A batch normalization of tensors with ``rank`` dimensions, in evaluation."""
    mean = statistics["running_mean"]
    norm: Any = _BY_RANK[rank](len(mean), epsilon)
    norm.running_mean, norm.running_var = mean.detach().clone(), statistics["running_var"].detach().clone()
    for name in ("weight", "bias"):
        value = affine.get(name)
        setattr(norm, name, None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False))
    evaluated: nn.Module = norm.eval()
    return evaluated
