"""The kernels compile for every architecture without a GPU, spill nothing, and load 16 bytes at a time."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from halfbyte.runtime.kernels import build
from halfbyte.runtime.kernels.variants import Variant


def _why_no_compiler() -> str | None:
    try:
        build._nvrtc()
    except build.NoCompiler as error:
        return f"NVRTC: {error.what}"
    return None


pytestmark = pytest.mark.skipif(_why_no_compiler() is not None, reason=_why_no_compiler() or "")

VARIANTS = [
    Variant(), Variant(groups=2), Variant(groups=2, subs=2), Variant(groups=4, warps=12, registers=168), Variant(groups=8, warps=8, registers=255, stage_units=2), Variant(row_tiles=1),
    Variant(alu_words=4), Variant(subs=2), Variant(table_stride=128, alu_words=1), Variant(warps=14, stage_units=4, groups=2), Variant(registers=104), Variant(groups=2, registers=112),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def machine_code(code: bytes, folder: Path) -> str:
    """SASS, by the disassembler that Triton carries."""
    triton = pytest.importorskip("triton", reason="Triton is not installed, and its disassembler with it")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.is_file():
        pytest.skip("this Triton carries no disassembler")
    file = folder / "kernel.cubin"
    file.write_bytes(code)
    return subprocess.run([str(tool), "-c", str(file)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_spills_between_products_and_weights_come_by_the_copy_engine(variant, folder):
    code = machine_code(build.cubin("nf4_linear", "sm_90a", variant.defines, folder), folder)
    lines = [line for line in code.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    products = [i for i, line in enumerate(lines) if re.search(r"HMMA\.16816\.F32\.BF16", line)]
    unit = 4 * variant.row_tiles * variant.groups  # the products of the path for single units come first
    assert len(products) > unit
    assert not re.search(r"\b(?:LDL|STL)\b", "\n".join(lines[products[unit] : products[-1]]))
    assert re.search(r"UBLKCP", code)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
def test_older_architectures_compile_too(arch, folder):
    assert build.cubin("nf4_linear", arch, Variant(warps=8, table_stride=128).defines, folder)[:4] == b"\x7fELF"
    assert build.cubin("nf4_dequantize", arch, (), folder)[:4] == b"\x7fELF"


def test_a_compiled_kernel_is_kept_and_a_damaged_one_compiled_again(tmp_path):
    first = build.cubin("nf4_dequantize", "sm_90a", (), tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    assert build.cubin("nf4_dequantize", "sm_90a", (), tmp_path) == first
    assert file.stat().st_mtime_ns == before
    file.write_bytes(file.read_bytes()[:-100])
    assert build.cubin("nf4_dequantize", "sm_90a", (), tmp_path) == first
    assert build.read_kept(file) == first


def test_a_source_that_does_not_compile_says_why():
    with pytest.raises(build.NoCompiler, match="undefined"):
        build.compile_source("wrong", "__global__ void f() { undefined_name(); }", ("--gpu-architecture=sm_90a",))
