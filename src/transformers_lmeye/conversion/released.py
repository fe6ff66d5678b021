"""What the authors' `.pth` files hold: names, shapes, and which tensor of the network each one is.

All are dictionaries with the trained tensors under `net`; names may be prefixed `module.`. Three layouts exist, told
from the names:

- version 1, stage 1: the static mapping, `imageLinear` and `new_embedding`;
- version 1, stage 2: the whole network, the static mapping as `imgLinear` and `embedding_img`;
- version 0.1, over BLIP-2: `instruction_*`, `language_projection` and `query_tokens`.
"""

import pickle
from dataclasses import dataclass
from os import PathLike

import torch


# Released name -> name in the Interactive Perception Network; a linear map stands for its weight and bias.
STAGE_1 = {"imageLinear": "visual_mapping", "new_embedding": "image_token"}
STAGE_2_STATIC = {"imgLinear": "visual_mapping", "embedding_img": "image_token"}
STAGE_2 = {
    **STAGE_2_STATIC,
    "llm2clip": "request_projection",
    "promptMlp": "fine_grained_projection",
    "imgdLinear": "dynamic_projection",
    "embedding_imgd": "request_token",
}
# The Q-Former's queries are frozen, and no part of the network.
QUERY_TOKENS = "query_tokens"
V0_1 = {
    "language_projection": "visual_mapping",
    "instruction_blip22clip": "request_projection",
    "instruction_linear": "fine_grained_projection",
    "instruction_imgdLinear": "dynamic_projection",
    "instruction_embedding_imgq": "request_token",
    "instruction_embedding_imgd": "dynamic_token",
    QUERY_TOKENS: None,
}
LAYOUTS = {"v1, stage 1": STAGE_1, "v1, stage 2": STAGE_2, "v0.1": V0_1}
VECTORS = (
    "new_embedding",
    "embedding_img",
    "embedding_imgd",
    "instruction_embedding_imgq",
    "instruction_embedding_imgd",
)


@dataclass(frozen=True)
class Widths:
    """The widths of frozen parts that the shapes of released tensors follow from.

    Args:
        input (`int`): d_L, the language model's input embeddings.
        request (`int`): its last hidden state.
        image (`int`): what the static mapping reads: the projected image feature, or the Q-Former's outputs.
        text (`int`): d_t, the CLIP text encoder.
        projection (`int`): d_p, its projected output.
        num_queries (`int`): the Q-Former's outputs per image.
        table_rows (`int`): rows of the language model's embedding table.
    """

    input: int
    request: int = 0
    image: int = 0
    text: int = 0
    projection: int = 0
    num_queries: int = 0
    table_rows: int = 0


def read_released(path: str | PathLike) -> dict[str, torch.Tensor]:
    """
    The trained tensors of a released file, by their names without `module.`.

    Raises:
        ValueError: the file holds something else, or one name twice.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is no checkpoint that can be read without running code from it: {error}") from error
    net = content.get("net") if isinstance(content, dict) else None
    if not isinstance(net, dict) or not all(isinstance(value, torch.Tensor) for value in net.values()):
        raise ValueError(
            f'{path} is no released checkpoint: it must hold a dictionary of tensors under the key "net".'
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, value in net.items():
        bare = name.removeprefix("module.")
        if bare in tensors:
            raise ValueError(f"{path} holds {bare} twice, with and without the prefix module.")
        tensors[bare] = value.detach()
    return tensors


def layout_of(tensors: dict[str, torch.Tensor], path: str | PathLike) -> str:
    """
    The layout that a file's names belong to, a key of `LAYOUTS`.

    Raises:
        ValueError: they belong to none.
    """
    parts = {name.split(".")[0] for name in tensors}
    for layout in ("v0.1", "v1, stage 2", "v1, stage 1"):
        if parts & LAYOUTS[layout].keys():
            return layout
    found = ", ".join(sorted(tensors)) or "there are none"
    raise ValueError(
        f"{path} is no released LMEye checkpoint: none of its tensors ({found}) has a name that the authors used."
    )


def expected_shapes(
    layout: str, widths: Widths, num_dynamic_tokens: int, num_fine_grained_tokens: int
) -> dict[str, list[int]]:
    """
    Every tensor of a layout and its shape.

    Args:
        layout (`str`): a key of `LAYOUTS`.
        widths ([`Widths`]): of the frozen parts.
        num_dynamic_tokens (`int`): k; in v0.1 the number of request vectors, too.
        num_fine_grained_tokens (`int`): soft tokens made of the global image feature.
    """
    w, k = widths, num_dynamic_tokens
    linears = {  # inputs, outputs
        "imageLinear": (w.image, w.input),
        "imgLinear": (w.image, w.input),
        "llm2clip": (w.request, w.text),
        "promptMlp": (w.image, num_fine_grained_tokens * w.text),
        "imgdLinear": (w.projection, k * w.input),
        "language_projection": (w.image, w.input),
        "instruction_blip22clip": (w.request, k * w.text),
        "instruction_linear": (w.image, w.text),
        "instruction_imgdLinear": (w.projection, w.input),
    }
    shapes: dict[str, list[int]] = {}
    for name in LAYOUTS[layout]:
        if name in linears:
            inputs, outputs = linears[name]
            shapes |= {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}
        else:
            shapes[name] = [1, w.input] if name in VECTORS else [1, w.num_queries, w.image]
    return shapes


def token_counts(layout: str, tensors: dict[str, torch.Tensor], widths: Widths) -> tuple[int, int]:
    """
    Dynamic tokens per request and soft tokens per image, from the shapes of a file's tensors; 5 (what most releases
    have) where these cannot be told.
    """

    def count(name: str, width: int) -> int:
        rows = tensors[name].shape[0] if name in tensors and tensors[name].dim() else 0
        return rows // width if rows and width and rows % width == 0 else 5

    if layout == "v0.1":
        return count("instruction_blip22clip.weight", widths.text), 5
    return count("imgdLinear.weight", widths.input), count("promptMlp.weight", widths.text)


def problems(tensors: dict[str, torch.Tensor], expected: dict[str, list[int]]) -> list[str]:
    """What is missing, left over or of the wrong shape, a line each; empty where all is well."""
    found = {name: list(value.shape) for name, value in tensors.items()}
    lines = [f"missing: {name}, expected {expected[name]}" for name in sorted(expected.keys() - found.keys())]
    lines += [f"left over: {name}, found {found[name]}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        accepted = [expected[name]]
        if name in VECTORS:  # stored as [d], [1, d] or [1, 1, d]
            accepted += [expected[name][1:], [1, *expected[name]]]
        if found[name] not in accepted:
            lines.append(f"wrong shape: {name}, expected {expected[name]}, found {found[name]}")
    return lines


__all__ = [
    "LAYOUTS",
    "QUERY_TOKENS",
    "STAGE_1",
    "STAGE_2_STATIC",
    "VECTORS",
    "Widths",
    "expected_shapes",
    "layout_of",
    "problems",
    "read_released",
    "token_counts",
]
