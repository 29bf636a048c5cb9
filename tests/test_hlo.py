"""Counts of `benchmarks/_hlo.py` compared with hand-counted programs."""

import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[1] / "benchmarks" / "_hlo.py"
if not PATH.exists():
    pytest.skip("the benchmarks are not part of this copy", allow_module_level=True)
spec = importlib.util.spec_from_file_location("_hlo", PATH)
hlo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hlo)

PROGRAM = """HloModule jit_step

%branch (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %all-reduce.9 = f32[2]{0} all-reduce(%p), to_apply=%add
}

ENTRY %main (a: f32[4,8], b: bf16[4,8]) -> (f32[4,8], f32[2]) {
  %a = f32[4,8]{1,0} parameter(0)
  %b = bf16[4,8]{1,0:T(8,128)} parameter(1)
  %one = f32[] constant(1)
  %both = (f32[4,8]{1,0}, f32[2]{0}) fusion(%a, /*index=1*/%b), kind=kLoop, calls=%f
  %left = f32[4,8]{1,0} get-tuple-element(%both), index=0
  %sum = f32[2]{0} get-tuple-element(%both), index=1
  %start = f32[2]{0} all-reduce-start(%sum), to_apply=%add
  %done = f32[2]{0} all-reduce-done(%start)
  %gathered = f32[4]{0} all-gather(%done), dimensions={0}
  %if = f32[2]{0} conditional(%one, %sum, %sum), branch_computations={%branch}
  %copied = f32[4,8]{1,0} copy(%left)
  ROOT %out = (f32[4,8]{1,0}, f32[2]{0}) tuple(%copied, %if)
}
"""
FOUND = hlo.computations(PROGRAM)
ENTRY = FOUND["ENTRY"]


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[]", 4), ("bf16[4,8]{1,0:T(8,128)}", 64), ("(f32[3]{0}, pred[2]{0})", 14),
     ("s32[0,5]", 0)],
)  # fmt: skip
def test_bytes_sum_over_all_arrays_and_ignore_layout(shape, size):
    assert hlo.bytes_of(shape) == size


def test_kernels_are_counted_with_bytes_read_and_written():
    # The fusion: 128 and 64 in, 128 and 8 out. The copy: 128 in and out.
    assert hlo.kernels(FOUND) == (2, 328 + 256)


def test_fast_memory_is_not_counted_but_copies_to_it_are():
    found = hlo.computations("""ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0:T(128)} parameter(0)
  %part = ((f32[64]{0:T(128)}), f32[32]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%a)
  %have = f32[32]{0:T(128)S(1)} slice-done(%part)
  %whole = (f32[64]{0:T(128)S(1)}, f32[64]{0:T(128)}, u32[]{:S(2)}) copy-start(%a)
  %there = f32[64]{0:T(128)S(1)} copy-done(%whole)
  ROOT %out = f32[64]{0:T(128)} fusion(%have, %there), kind=kLoop, calls=%f
}
""")
    # Read: 32 numbers and 64. Written: 64.
    assert hlo.kernels(found) == (1, 4 * (32 + 64 + 64))


def test_in_place_update_counts_only_the_bytes_written():
    found = hlo.computations("""%put (p: f32[64,8], x: f32[8]) -> f32[64,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %x = f32[8]{0} parameter(1)
  %row = f32[1,8]{1,0} bitcast(%x)
  %zero = s32[] constant(0)
  ROOT %all = f32[64,8]{1,0} dynamic-update-slice(%p, %row, %zero, %zero)
}

ENTRY %main (a: f32[64,8], b: f32[8]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f32[8]{0} parameter(1)
  ROOT %out = f32[64,8]{1,0} fusion(%a, %b), kind=kLoop, calls=%put
}
""")
    assert hlo.kernels(found) == (1, 4 * (8 + 8))


def test_collectives_are_counted_once_per_computation():
    assert hlo.collectives(ENTRY) == [("all-reduce", "f32[2]{0}"),
                                      ("all-gather", "f32[4]{0}")]  # fmt: skip
    (rare,) = hlo.collectives(hlo.computations(PROGRAM)["branch"])
    assert rare[0] == "all-reduce"
