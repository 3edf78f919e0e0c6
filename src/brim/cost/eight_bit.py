"""The tape of a product with an int8 matrix, as bitsandbytes' `MatMul8bitLt` runs it with its usual threshold of 6.

Read from bitsandbytes 0.50: autograd/_functions.py MatMul8bitLt, backends/cuda/ops.py int8_vectorwise_quant and
int8_mm_dequant, backends/default/ops.py int8_mixed_scaled_mm.
Leaves out: the columns of outliers and their copies (about 7 of thousands: LLM.int8(), arXiv 2208.07339, section 3.2).
"""

from __future__ import annotations

from fractions import Fraction

from brim.cost.setting import Setting
from brim.cost.tape import Tape, Tensor, fixed, per_token
from brim.spec.model import Linear

_CODE_BYTES, _HALF_BYTES, _SUM_BYTES = 1, 2, 4  # int8 codes and masks, fp16 values, int32 sums


def multiply_eight_bit(tape: Tape, x: Tensor, linear: Linear, setting: Setting, tokens: Fraction | int) -> Tensor:
    """Record the product of an input of either width and return it.

    The input itself is kept as it came, in an attribute of the graph's node and not by `save_for_backward`: several
    products share it, checkpointing does not see it, and it goes when the graph goes. Outliers are added by `addmm`,
    which autocast runs in its dtype; without autocast the product answers in the dtype of its input.
    """
    c, count, width = setting.compute_bytes, linear.in_features * tokens, linear.out_features * tokens
    came = 4 if x.size.per_token > c * count else c
    answers = c if setting.autocast else came
    quantising = (2 * _HALF_BYTES + 2 * _CODE_BYTES) * count  # the input in fp16 and its absolute value, mask, codes
    multiplying = _CODE_BYTES * count + (_SUM_BYTES + _HALF_BYTES + came) * width
    recast = came * width if came > answers else 0  # the gradient meets the matrix in the dtype of the input
    output = tape.op(
        linear.name, [x], per_token(round(answers * width)), clings=[x],
        scratch=per_token(max(0, round(max(quantising, multiplying) - answers * width))),
        grad_scratch=fixed(came * linear.num_weights) + per_token(round(recast)),
    )  # fmt: skip
    tape.hold(x)
    return output
