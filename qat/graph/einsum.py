"""Einsums of two tensors that are a batched matrix product, as that: TensorRT fuses products, and not equations."""

from __future__ import annotations

from typing import Any


def product_of_einsum(equation: str, left: Any, right: Any) -> Any | None:
    """torch.einsum by permutations and one product; None if the equation is no batched product of two matrices.

    Args:
        equation: such as ``b h i d, b h j d -> b h i j``: one letter of each tensor alone, one that is summed over, and
            any number that both tensors and the result have.
        left: has the letters before the comma.
        right: has the letters behind it.
    """
    given, _, made = equation.replace(" ", "").partition("->")
    first, _, second = given.partition(",")
    letters = [*first, *second, *made]
    plain = all(letter.isalpha() for letter in letters)
    if not plain or any(len(set(part)) != len(part) for part in (first, second, made)):
        return None
    batch = [letter for letter in made if letter in first and letter in second]
    rows = [letter for letter in made if letter in first and letter not in second]
    columns = [letter for letter in made if letter in second and letter not in first]
    summed = [letter for letter in first if letter in second and letter not in made]
    counts = (len(rows), len(columns), len(summed))
    if counts != (1, 1, 1) or len(letters) != 3 * len(batch) + 6:
        return None
    product = _permuted(left, first, [*batch, *rows, *summed]) @ _permuted(right, second, [*batch, *summed, *columns])
    return _permuted(product, "".join([*batch, *rows, *columns]), list(made))


def _permuted(tensor: Any, letters: str, wanted: list[str]) -> Any:
    order = [letters.index(letter) for letter in wanted]
    if order == list(range(len(order))):
        return tensor
    if order[:-2] == list(range(len(order) - 2)):
        return tensor.transpose(-2, -1)
    return tensor.permute(order)
