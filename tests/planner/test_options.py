from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_toys import make_job

from brim.errors import BrimError, InvalidInput
from brim.planner.options import read_options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"effective_batch_size": 0}, "effective_batch_size must be a whole number from 1 to 16,777,216, not 0"),
        ({"seq_len": 2**30}, "seq_len must be a whole number from 1 to 16,777,216, not 1073741824"),
        ({"micro_batch_size": 2.5}, "micro_batch_size must be a whole number from 1 to 16,777,216, not 2.5"),
        ({"micro_batch_size": True}, "micro_batch_size must be a whole number from 1 to 16,777,216, not 'True'"),
        ({"lora_r": 10**30}, "lora_r must be a whole number from 1 to 65,536, not a number of more than 24 digits"),
        ({"epochs": float("nan")}, "epochs must be a number above 0 and at most 10,000, not nan"),
        ({"epochs": -1}, "epochs must be a number above 0 and at most 10,000, not -1"),
        ({"method": "qlorra"}, "unknown method 'qlorra'; did you mean qlora or lora?"),
        ({"effective_batchsize": 3}, "unknown option 'effective_batchsize'; did you mean effective_batch_size"),
        ({"trainer": "trll"}, "unknown trainer 'trll'; did you mean trl"),
        ({"task": "chatt"}, "unknown task 'chatt'; did you mean chat?"),
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm'; did you mean adamw"),
        ({"packing": "yes"}, "packing must be true or false, not 'yes'"),
        ({"dataset": ""}, "dataset must be a name, not ''"),
        ({"dataset": "a\nb"}, "dataset must be a name, not 'a?b'"),
        ({"lora_targets": ","}, "lora_targets must be names such as q_proj,v_proj, not ','"),
        ({"lora_targets": "q_pro"}, "unknown LoRA target of meta-llama/Llama-2-7b-hf 'q_pro'; did you mean q_proj"),
        ({"method": "full", "lora_r": 8}, "lora_r needs method lora or qlora, not full"),
        ({"method": "full", "quantization": "nf4"},
         "quantization freezes the base: it needs method qlora, not full"),
        ({"quantization": "int8", "double_quant": True},
         "double_quant quantises the scales of 4-bit weights; int8 has none"),
        ({"optimizer": "adamw_torch", "optimizer_kernel": "fused"},
         "optimizer adamw_torch is the foreach kernel, but optimizer_kernel fused was asked for; leave one of them "
         "out"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        make_job(**options)
    assert str(refused.value).startswith(text) and "\n" not in str(refused.value)


WILD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.lists(st.text(max_size=3))


@settings(max_examples=300, deadline=None)
@given(
    values=st.dictionaries(
        st.sampled_from(
            ["method", "num_nodes", "trainer", "seq_len", "task", "effective_batch_size", "effective_batch_tokens",
             "dataset", "dataset_size", "epochs", "lora_r", "lora_alpha", "lora_targets", "optimizer", "dtype", "by",
             "micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "attention_kernel",
             "optimizer_kernel", "loss_kernel", "packing", "quantization", "double_quant", "refresh"]
        ),
        WILD, max_size=4,
    )
)  # fmt: skip
def test_no_value_gives_a_traceback(values: dict[str, Any]) -> None:
    try:
        read_options(values)
        make_job(**values)
    except BrimError as error:
        assert str(error) and "\n" not in str(error)
