"""Which models a stranger's sidecar may name without a question: those of torchvision, timm and Ultralytics by a plain
name, with arguments that only shape the network. What loads a file, downloads or unpickles is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.pretrained.ultralytics_models import PREFIX

# Arguments that are numbers, switches and the like to every constructor of torchvision, timm and ours.
_SHAPING = frozenset(
    [
        "num_classes",
        "in_chans",
        "img_size",
        "image_size",
        "patch_size",
        "drop_rate",
        "drop_path_rate",
        "attn_drop_rate",
        "proj_drop_rate",
        "pos_drop_rate",
        "patch_drop_rate",
        "global_pool",
        "features_only",
        "out_indices",
        "output_stride",
        "window_size",
        "embed_dim",
        "depth",
        "depths",
        "num_heads",
        "mlp_ratio",
        "qkv_bias",
        "class_token",
        "reg_tokens",
        "init_values",
        "zero_init_residual",
        "zero_init_last",
        "groups",
        "width_per_group",
        "base_width",
        "cardinality",
        "replace_stride_with_dilation",
        "width_mult",
        "dropout",
        "stochastic_depth_prob",
        "attention_dropout",
        "aux_logits",
        "aux_loss",
        "init_weights",
        "transform_input",
        "memory_efficient",
        "growth_rate",
        "drop_path",
        "trainable_backbone_layers",
        "min_size",
        "max_size",
        "image_mean",
        "image_std",
        "dynamic_img_size",
        "decoded",
        "for_loss",
    ]
)
_LARGEST, _LONGEST, _DEEPEST = 1 << 16, 64, 3  # a number; a list or a text; lists in lists
_PLAIN_NAME = re.compile(r"(timm/)?[A-Za-z0-9][\w.-]*")
_PLAIN_YAML = re.compile(r"[A-Za-z0-9][\w-]*\.yaml")


def loads_something(name: str, kwargs: Mapping[str, Any]) -> str:
    """What the model ``name`` with these arguments would load, run or read, for people; '' if nothing.

    A model of the user's own, 'path/file.py:function', is another matter: see qat/checkpoint.py.
    """
    if name.startswith(PREFIX):
        file = name.removeprefix(PREFIX)
        # A YAML file of that name in the folder comes before the package's own, and may name code.
        if not _PLAIN_YAML.fullmatch(file) or Path(file).exists():
            return f"have Ultralytics read {file}, which can run code that is in it or download it"
    elif not _PLAIN_NAME.fullmatch(name):
        return f"build the model {name}"
    return next(
        (
            f"build {name} with {key}={str(value)[:200]!r}, which may load or download files"
            for key, value in kwargs.items()
            if value is not None and value is not False and not (key in _SHAPING and _is_plain(value))
        ),
        "",
    )


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (list, tuple)):
        return depth < _DEEPEST and len(value) <= _LONGEST and all(_is_plain(one, depth + 1) for one in value)
    if isinstance(value, str):
        return re.fullmatch(r"\w{0,64}", value) is not None
    return value is None or isinstance(value, bool) or (isinstance(value, (int, float)) and abs(value) <= _LARGEST)
