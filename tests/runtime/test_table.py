"""A table says one path for any number of rows, and never two for a batch of 1 to 16."""

from __future__ import annotations

import pytest
import torch
from runtime.stored_weights import drawn

from halfbyte.errors import UsageError
from halfbyte.runtime.linear import table
from halfbyte.runtime.linear.module import Nf4Linear, nf4_linear


def test_each_limit_belongs_to_its_path():
    found = [table.path_for("16:triton 64:kernel expand", rows) for rows in (0, 1, 16, 17, 64, 65, 100_000)]
    assert found == ["triton", "triton", "triton", "kernel", "kernel", "expand", "expand"]


@pytest.mark.parametrize(
    "text", ["", "kernel expand", "8:kernel expand", "16:kernel 16:kernel expand", "64:kernel 32:kernel expand",
             "16:kernel", "16:fast expand", "-16:kernel expand", "1e3:kernel expand", "³²:kernel expand"],
)  # fmt: skip
def test_a_line_that_is_no_table_is_refused(text):
    with pytest.raises(UsageError, match="no table of paths"):
        table.steps(text)
    with pytest.raises(UsageError, match="no table of paths"):
        nf4_linear(torch.zeros(1, 64), drawn((32,), 64), text)


def test_a_part_of_a_stack_alone_is_that_part_without_a_copy():
    weight = drawn((64, 32, 32), 128)
    x = torch.randn(3, 128)
    whole = Nf4Linear(weight)(x).split([64, 32, 32], dim=-1)
    for index in range(3):
        part = weight.part(index)
        assert part.tiles.untyped_storage().data_ptr() == weight.tiles.untyped_storage().data_ptr()
        torch.testing.assert_close(nf4_linear(x, part), whole[index], rtol=1e-6, atol=1e-6)


def test_a_backward_pass_is_refused_with_a_sentence():
    x = torch.randn(2, 64, requires_grad=True)
    y = Nf4Linear(drawn((32,), 64))(x)
    with pytest.raises(UsageError, match="no gradient"):
        y.sum().backward()
