from __future__ import annotations

from planner_toys import make_job

from brim.planner.experts import unquantised_expert_bytes


def test_fused_experts_are_counted_only_under_quantisation() -> None:
    mixtral = {"model": "mistralai/Mixtral-8x7B-v0.1"}
    # 32 layers x 8 experts x 3 matrices of 4096 x 14336, 2 bytes each.
    assert unquantised_expert_bytes(make_job(**mixtral, method="qlora").workload) == 32 * 8 * 3 * 4096 * 14336 * 2
    assert unquantised_expert_bytes(make_job(**mixtral, method="lora").workload) == 0
    assert unquantised_expert_bytes(make_job(method="qlora").workload) == 0
