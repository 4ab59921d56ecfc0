"""The reference back end: a rule run by eager torch on one tensor. The definition of correct, and the torch path."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from schuss.engine.pieces import Pieces, apply
from schuss.engine.stages import Stages, Values, cut
from schuss.engine.state import Cell, real_view
from schuss.engine.storage import Storage, compute_dtype, real
from schuss.engine.trace import Formula
from schuss.rule import Rule, Variant


@dataclass
class Update:
    """One tensor's step.

    Half types are computed in float32 and rounded once; complex tensors through their real view; of a sparse gradient
    only the rows that it has are touched.

    Args:
        rule, variant, pieces: what is computed.
        p: the parameter.
        g: its gradient.
        states: its states by letter; None for one that does not exist.
        scalars: by name.
        differentiable: whether what is written keeps its graph.
    """

    rule: Rule
    variant: Variant
    pieces: Pieces
    p: Cell
    g: torch.Tensor
    states: Mapping[str, Cell | None]
    scalars: Mapping[str, Any]
    differentiable: bool = False

    @property
    def sums_everywhere(self) -> int:
        """How many passes of kernels would be over before all sums over all tensors are known."""
        return self._stages.sums_everywhere if self.rule.sums_everywhere(self.variant) else 0

    def share(self, k: int) -> list[Any]:
        """What the tensor gives to the sums over all tensors that follow a pass."""
        with torch.set_grad_enabled(self.differentiable):
            return [self._values(node.args[0]) for node in self._stages.levels[k].everywhere]

    def tell(self, k: int, sums: list[Any]) -> None:
        """Take over the sums over all tensors."""
        there = [torch.as_tensor(number, dtype=torch.float64, device=self.g.device) for number in sums]
        self._values.known |= zip(self._stages.levels[k].everywhere, there, strict=True)

    def finish(self) -> dict[str, torch.Tensor]:
        """Write the new parameter and states into their cells; returns the new numbers by letter."""
        there = {"p": self.p, **{n: s for n, s in self.states.items() if s is not None}}
        rows = None
        if self.g.layout != torch.strided:
            rows = _Rows(there, self.g.coalesce())
            there = rows.parts
        inputs, others = self._whole if rows is None else self._inputs(there, rows.g)
        if self.sums_everywhere:
            new = {letter: self._values(node) for letter, node in self._formula[0]}
        else:
            flags = self.rule.chosen(self.variant)
            states = {letter: inputs.get(letter) for letter in self.states}
            states |= {letter: others[letter] for letter in self.rule.number_states}
            new = apply(self.rule.formula, self.pieces, inputs["p"], inputs["g"], states, others | flags)
        own = {id(value): letter for letter, value in inputs.items()}
        # What was another role's value must outlive the writing of that role.
        moved = {n: new[n].clone() for n in there if own.get(id(new[n]), n) != n}
        for letter, cell in there.items():
            cell.write(moved.get(letter, new[letter]))
        if rows is not None:
            rows.put_back()
        return {letter: new[letter] for letter in self.rule.number_states}

    def _inputs(self, cells: Mapping[str, Cell], g: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What is computed with: tensors in the computation's dtype, and numbers as tensors of it.

        So the numbers round, and promote, as in a kernel. Those that are states keep the digits that they have.
        """
        dtype = computed_in([g, *(cell.values for cell in cells.values())])
        inputs = {letter: cell.read(dtype) for letter, cell in cells.items()}
        if self.differentiable:  # autograd keeps what it multiplies: it must be a copy of what is about to be written
            inputs = {letter: value.clone() for letter, value in inputs.items()}
        inputs["g"] = real_view(g).to(dtype)
        return inputs, {
            name: value.to(dtype)
            if isinstance(value, torch.Tensor)
            else torch.tensor(value, dtype=torch.float64 if name in self.rule.number_states else dtype, device=g.device)
            for name, value in self.scalars.items()
        }

    @cached_property
    def _formula(self) -> tuple[Formula, tuple[str, ...]]:
        return self.rule.trace(self.variant, self.pieces)

    @cached_property
    def _stages(self) -> Stages:
        formula, scalars = self._formula
        return cut(formula, scalars, self.rule.domains())

    @cached_property
    def _whole(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return self._inputs({"p": self.p, **{n: s for n, s in self.states.items() if s is not None}}, self.g)

    @cached_property
    def _values(self) -> Values:
        inputs, others = self._whole
        return Values(inputs | others)


class _Rows:
    """The rows of a parameter and its states that a sparse gradient has.

    Blocks are read and written whole; values that have not changed get the codes that they had.
    """

    def __init__(self, cells: Mapping[str, Cell], g: torch.Tensor) -> None:
        self.g, self._index, self._cells = g.values(), tuple(g.indices()), cells
        self._is_one = len(self._index) == 1  # rows of the first dimension, which torch reads and writes faster
        self._wholes = {n: c.values if c.is_plain else c.read(torch.float32) for n, c in cells.items()}
        taken = {letter: self._taken(whole) for letter, whole in self._wholes.items()}
        self.parts = {letter: Cell(Storage(part.dtype), part) for letter, part in taken.items()}

    def _taken(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.index_select(0, self._index[0]) if self._is_one else whole[self._index]

    def put_back(self) -> None:
        """Write the rows to where they came from."""
        for letter, whole in self._wholes.items():
            if self._is_one:
                whole.index_copy_(0, self._index[0], self.parts[letter].values)
            else:
                whole.index_put_(self._index, self.parts[letter].values)
            if not self._cells[letter].is_plain:
                self._cells[letter].write(whole)


def computed_in(tensors: list[torch.Tensor]) -> torch.dtype:
    """The dtype in which a rule computes on these tensors."""
    return compute_dtype({str(i): Storage(real(t.dtype)) for i, t in enumerate(tensors)})
