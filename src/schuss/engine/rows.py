"""A launch of the Numba back end for rules with numbers of rows and columns."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from schuss.engine import numba
from schuss.engine.bucket import Array, CpuBucket, sizes_of
from schuss.engine.numba_rows import TABLES, rows_source
from schuss.engine.stages import SUMS, Domain, Level, Sums, Values
from schuss.engine.storage import Layout, compute_dtype
from schuss.engine.trace import Expr, Formula

STRETCH = 2**16
"""Elements that one kernel call goes through, about: whole rows, and whole matrices if they are small."""


class RowsBucket(CpuBucket):
    """Tensors of one shape whose rule computes with numbers of rows and columns; see `Bucket`.

    Between passes all tensors are computed with at once: numbers are tensors [tensor, 1, ...], and those of rows and
    columns have the dimensions of their states behind that of the tensors.
    """

    @cached_property
    def _dimensions(self) -> tuple[int, int, int]:
        """Matrices of a tensor, rows of a matrix, columns."""
        shape = self.params[0].shape
        return int(np.prod(shape[:-2])), shape[-2], shape[-1]

    def _compile(
        self, formula: Formula, scalars: tuple[str, ...], layout: Layout, vectors: Mapping[str, Domain]
    ) -> int:
        source = rows_source(self._title, formula, scalars, layout, vectors)
        return numba.kernel_address(self._rule.owner.lower(), source)

    def _compile_sums(self, sums: Sums, layout: Layout) -> int:
        title = f"Sums of {self._title}"
        source = rows_source(title, sums.formula, sums.scalars, layout, sums.vectors, sums)
        return numba.kernel_address("sum", source)

    # --- stretches of rows ------------------------------------------------------------------------------------------

    def _plan_sizes(self) -> None:
        super()._plan_sizes()
        matrices, height, width = self._dimensions
        most = max(1, STRETCH // max(width, 1))
        step = most // height * height if height and most >= height else most
        firsts = [
            start
            for matrix in (range(matrices) if step < height else [0])
            for start in range(matrix * height, (matrix + 1) * height if step < height else matrices * height, step)
        ]
        ends = [*firsts[1:], matrices * height][: len(firsts)]
        blocks = [-(-(end - first) // height) for first, end in zip(firsts, ends, strict=True)] if height else []
        units, block = [], 0
        for tensor in np.flatnonzero(self.active):
            for first, end, count in zip(firsts, ends, blocks, strict=True):
                units.append((tensor, first, end - first, block))
                block += count
        self._units = np.array(units, np.int64).reshape(-1, 4)
        self._tensors_with_units, self._first_unit = np.unique(self._units[:, 0], return_index=True)
        self._unit_size = np.ones(len(units), np.int64)
        self._unit_weight = np.zeros(len(units) + 1, np.int64)
        np.cumsum(self._units[:, 2] * width + 512, out=self._unit_weight[1:])
        # Stretches of columns of one matrix lie next to one another.
        matrix_of = [
            tensor * matrices + (first + k * height) // height
            for tensor, first, rows, _ in units
            for k in range(-(-rows // height))
        ]
        self._matrices_with_blocks = np.unique(np.array(matrix_of, np.int64))
        self._blocks, self._first_block = block, np.searchsorted(matrix_of, self._matrices_with_blocks)

    def _context(self, *outputs: Array) -> Array:
        matrices, height, width = self._dimensions
        self._shape = np.array([height, width, len(self.params), matrices * height, self._blocks], np.int64)
        self._wide = self._all_addresses()
        own = (self._wide, self._row_of, self._table, self._streams, self._units, self._beside, self._shape)
        addresses = [table.ctypes.data for table in (*own, *outputs)]
        return np.array(addresses + [0] * (len(TABLES) - len(addresses)), np.int64)

    def _store(self, kernel: int) -> None:
        context = self._context()
        numba.sweep(self._threads, kernel, context.ctypes.data, self._unit_size, self._unit_weight)

    def _run(self, kernel: int) -> None:
        context = self._context()
        numba.launch(
            self._threads, kernel, context.ctypes.data, self._unit_size, self._unit_weight, *self._per_tensor, self._new
        )

    @property
    def _threads(self) -> int:
        return min(numba.parts(self._elements), max(len(self._units), 1))

    # --- between passes ---------------------------------------------------------------------------------------------

    def _start_stages(self) -> None:
        known = {name: self._as_numbers(values) for name, values in self._scalars.items()}
        self._found, self._values = 0, Values(known, self._stacked)
        self._values.known |= {n: self._as_numbers(sizes_of(n, self.params)) for n in self._stages.sizes}
        self._beside = np.zeros((len(self.params), len(self._stages.vectors)), np.int64)
        self._vectors: dict[str, torch.Tensor] = {}

    def _as_numbers(self, values: Any) -> torch.Tensor:
        numbers = torch.from_numpy(np.array(values, np.float64))
        return numbers.view(-1, *[1] * self.params[0].dim())

    def _sum(self, level: Level, kernel: int) -> list[Any]:
        assert level.sums is not None
        matrices, height, width = self._dimensions
        count, batch = len(self.params), self.params[0].shape[:-2]
        sums = np.zeros((len(self._units), len(level.sums.terms)))
        of_rows = np.zeros((len(level.sums.rows), count, matrices * height))
        of_columns = np.zeros((len(level.sums.columns), self._blocks, width), self._table.dtype)
        context = self._context(sums, of_rows, of_columns)
        numba.sweep(self._threads, kernel, context.ctypes.data, self._unit_size, self._unit_weight)
        results: dict[str, list[torch.Tensor]] = {op: [] for op in (*SUMS, "row_mean", "column_mean")}
        for k in range(len(level.sums.terms)):
            total = np.zeros(count)
            total[self._tensors_with_units] = np.add.reduceat(sums[:, k], self._first_unit)
            results["dot"].append(self._as_numbers(total))
        for rows in of_rows:
            results["row_mean"].append(torch.from_numpy(rows / max(width, 1)).view(count, *batch, height, 1))
        for columns in of_columns:
            total = np.zeros((count * matrices, width))
            total[self._matrices_with_blocks] = np.add.reduceat(columns, self._first_block, axis=0, dtype=np.float64)
            results["column_mean"].append(torch.from_numpy(total / max(height, 1)).view(count, *batch, 1, width))
        return [*results["dot"], *results["row_mean"], *results["column_mean"]]

    def _take(self, names: Sequence[str]) -> None:
        stages, dtype = self._stages, compute_dtype(self._layout)
        _, height, width = self._dimensions
        for name in names:
            value = self._values(stages.between[name])
            if name not in stages.vectors:
                self._table[:, stages.scalars.index(name)] = self._flat(value)
                continue
            sides = (1, width) if stages.vectors[name] == Domain.COLUMNS else (height, 1)
            vector = value.expand(len(self.params), *self.params[0].shape[:-2], *sides).to(dtype).contiguous()
            self._vectors[name] = vector  # it must outlive the launch
            k = list(stages.vectors).index(name)
            step = vector[0].numel() * vector.element_size()
            self._beside[:, k] = vector.data_ptr() + np.arange(len(self.params)) * step

    def _take_outside(self, nodes: Mapping[str, Expr]) -> None:
        numbers = {letter: node for letter, node in nodes.items() if letter in self._rule.number_states}
        for letter, node in numbers.items():
            k = self._scalar_names.index(self._rule.number_states[letter])
            self._new[:, k] = self._flat(self._values(node))
        super()._take_outside({letter: node for letter, node in nodes.items() if letter not in numbers})

    def _flat(self, numbers: Any) -> Array:
        """A number of each tensor, as an array."""
        flat = torch.as_tensor(numbers, dtype=torch.float64).expand(len(self.params), *[1] * self.params[0].dim())
        return flat.reshape(-1).numpy()

    def _over_tensors(self, numbers: Any) -> float:
        return super()._over_tensors(self._flat(numbers))

    def _here(self, number: Any) -> Any:
        return torch.as_tensor(number, dtype=torch.float64)
