"""What compilers dump is read right: samples of real dumps of small kernels, cut to the lines that matter."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.hardware_table import gpu, tpu
from experiments.hardware_table.hlo import largest_intermediate, moved

KERNEL = """Schedule analysis:
\ttotal scheduled bundles:    481
\tempty scheduled bundles:    6
\tnon empty scheduled bundles: 475
\t 475.00 scheduled bundles (100.00%): %sum.1 = f32[8,128]{1,0:T(8,128)} custom-call(%x.1), \
custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[8,128]{1,0}}
\t[opcode]     475 scheduled bundles (100.00%): custom-call          (1 instances, 475.00 avg)"""
FUSION = """Schedule analysis:
\ttotal scheduled bundles:    2533
\tempty scheduled bundles:    0
\tnon empty scheduled bundles: 2533
\t2533.00 scheduled bundles (100.00%): %fusion = f32[256,256]{1,0:T(8,128)S(1)} fusion(%x.1), kind=kOutput"""
CALLER = KERNEL.replace("481", "127").replace("475", "122")
USAGE = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     2     2     2     1     1     1     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 2
1 0 2 0 0 1 0 1 1 0
1 0 2 0 0 1 0 1 1 0
0 0 1 0 1 1 1 0 0 0
"""
PROFILE = """hlo_op_estimate {
  hlo_op_name: "sum.1"
  estimated_cycles: 8648
  num_equivalent_hlos: 1
}
"""
STAGES = ("70-final_hlo-static-per-bundle-utilization", "71-schedule-analysis_final_bundles", "72-final_bundles")


def dump(folder: Path, kernels: int = 1) -> None:
    """The files that a program with `kernels` Pallas kernels, a fusion and their caller leaves."""
    analyses = {"fusion": FUSION, "TLP": CALLER, "<late-initialization>": "\ttotal scheduled bundles: 32"}
    analyses |= {f"sum.{number + 1}": KERNEL for number in range(kernels)}
    (folder / tpu.DUMP).mkdir()
    for number, (name, analysis) in enumerate(analyses.items()):
        for stage, text in zip(STAGES, (USAGE, analysis, "bundles"), strict=True):
            (folder / tpu.DUMP / f"17954{number}-{name}-{stage}.txt").write_text(text)
    (folder / tpu.PROFILE).mkdir()
    (folder / tpu.PROFILE / "sum.1_static_llo_profile.textproto").write_text(PROFILE * kernels)


@pytest.mark.parametrize("kernels", [1, 2])
def test_only_pallas_kernels_count(tmp_path, kernels):
    dump(tmp_path, kernels)
    expected = {"bundles": 481, "spills": 2, "fills": 1, "cycles": 8648}
    assert tpu.code(tmp_path) == {name: kernels * value for name, value in expected.items()}


def test_without_a_profile_there_are_no_cycles_and_without_a_kernel_there_is_nothing(tmp_path):
    dump(tmp_path)
    for path in (tmp_path / tpu.PROFILE).iterdir():
        path.unlink()
    assert "cycles" not in tpu.code(tmp_path)
    for path in (tmp_path / tpu.DUMP).glob("*-sum.*"):
        path.unlink()
    assert tpu.code(tmp_path) == {}


@pytest.mark.parametrize("text", ["", "== CAPACITY:\n1 2\n== UTILIZATION:\n1 2\n", USAGE + "0 0 0\n"])
def test_slot_use_in_another_form_is_an_error_and_not_a_zero(text):
    with pytest.raises(ValueError, match="another form"):
        tpu.utilization(text)


def test_an_analysis_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="another form"):
        tpu.bundles("Schedule analysis:\n")


PTX = """
.version 9.0
.target sm_90a
.visible .entry body_mosaic_gpu_kernel(
\t@%p1 mbarrier.init.shared.b64 [%r1], %r2;
\t@%p1 mbarrier.init.shared.b64 [%r3], %r2;
\tfence.mbarrier_init.release.cluster;
\tmbarrier.arrive.expect_tx.shared.b64 %rd7, [__dynamic_shmem__0+8192], %r17;
\t@%p2 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd1, {%r5,%r6} ], [%r1];
\t@%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd1], %r5, [%r3];
\tcp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r5,%r6}], [%r4];
\tcp.async.bulk.commit_group;
\tmbarrier.try_wait.parity.shared.b64 P1, [%r1], %r5, %r7;
"""
PTXAS = """
ptxas info    : Compiling entry function 'body_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for body_mosaic_gpu_kernel
    16 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Used {registers} registers, used 2 barriers, 1 bytes smem
"""


def test_of_ptx_the_copies_to_shared_memory_the_barriers_and_the_spills_count():
    kernel = PTX + PTXAS.format(registers=69)
    assert gpu.ptx(kernel) == {"registers": 69, "spill_bytes": 64, "bulk_copies": 2, "barriers": 2}
    both = gpu.ptx(kernel + PTX + PTXAS.format(registers=168))
    assert both == {"registers": 168, "spill_bytes": 128, "bulk_copies": 4, "barriers": 4}
    assert gpu.ptx("a program of XLA alone prints neither") == {}


HLO = """HloModule jit_run, is_scheduled=true

%fused_computation (p: s8[4096,128]) -> f32[4096,128] {
  %p = s8[4096,128]{1,0} parameter(0)
  ROOT %inside = f32[4096,128]{1,0} convert(%p)
}

%body.1 (state: (f32[8,128], s32[])) -> (f32[8,128], s32[]) {
  %state = (f32[8,128]{1,0}, s32[]) parameter(0)
  %item = f32[8,128]{1,0} get-tuple-element(%state), index=0
  %looped = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} custom-call(%item), custom_call_target="x"
  ROOT %next = (f32[8,128]{1,0}, s32[]) tuple(%item, %item)
}

ENTRY %main.2 (bias: f32[128], x: s8[4096,128]) -> (f32[4096,128], f32[128]) {
  %x = s8[4096,128]{1,0:T(32,128)(4,1)} parameter(1), sharding={replicated}
  %prefetch = (s8[4096,128]{1,0:T(32,128)(4,1)S(1)}, s8[4096,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %arrived = s8[4096,128]{1,0:T(32,128)(4,1)S(1)} copy-done(%prefetch)
  %result = f32[4096,128]{1,0} fusion(%arrived), kind=kLoop, calls=%fused_computation
  %nibbles = s4[100,3]{1,0} custom-call(%arrived), custom_call_target="y"
  %pair = (f32[8,128]{1,0}, /*index=1*/f32[16,8,128]{2,1,0:T(8,128)}) custom-call(%arrived, %nibbles)
  %first = f32[8,128]{1,0} get-tuple-element(%pair), index=0
  %while.1 = (f32[8,128]{1,0}, s32[]) while(%first), condition=%cond, body=%body.1
  %view = f32[4096,128]{1,0} bitcast(%result)
  %bias = f32[128]{0:T(128)S(1)} get-tuple-element(%while.1), index=0
  ROOT %both = (f32[4096,128]{1,0}, f32[128]{0}) tuple(%view, %bias)
}
"""


def test_neither_arguments_nor_results_nor_the_inside_of_a_fusion_are_intermediates():
    assert largest_intermediate(HLO) == 4 * 16 * 8 * 128
    assert largest_intermediate(HLO.replace("f32[16,8,128]", "f32[1]")) == 2 * 64 * 128
    without_loop = HLO.replace("f32[16,8,128]", "f32[1]").replace("bf16[64,128]", "bf16[1]")
    assert largest_intermediate(without_loop.replace("f32[8,128]", "f32[1]")) == 150
    unfused = HLO.replace("calls=%fused_computation", "calls=%other")
    assert largest_intermediate(unfused) == 4 * 4096 * 128


def test_what_is_brought_on_chip_as_it_is_counts_as_moved():
    assert moved(HLO) == 4096 * 128
    assert moved(HLO.replace("copy-done", "copy")) == 0


def test_a_move_in_slices_is_no_array_of_its_own():
    sliced = HLO.replace("copy-start(", "slice-start(").replace("copy-done(%prefetch)", "slice-done(%prefetch)")
    joined = sliced.replace(
        '%nibbles = s4[100,3]{1,0} custom-call(%arrived), custom_call_target="y"',
        '%nibbles = s8[4096,128]{1,0} custom-call(%arrived), custom_call_target="ConcatBitcast"',
    )
    assert (moved(joined), largest_intermediate(joined)) == (4096 * 128, largest_intermediate(HLO))


def test_a_result_that_something_else_also_reads_is_still_a_result():
    assert largest_intermediate(HLO.replace("%view = f32[4096,128]{1,0} bitcast", "%view = f32[2]{0} negate")) > 10**6
