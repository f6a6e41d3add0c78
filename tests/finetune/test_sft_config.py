"""Settings that would do nothing are refused, by hand."""

import pytest

from graft.finetune.sft_config import refuse_unused


def test_settings_that_would_do_nothing() -> None:
    """Laws: an evaluation's rhythm without data and double quantization without 4 bits are refused; where they act they are not."""
    with pytest.raises(ValueError, match="eval_every=5 has nothing to evaluate; give --eval-data, or leave it out"):
        refuse_unused({"eval_every": 5}, method="lora", has_evaluation=False)
    for method in ("full", "lora"):
        with pytest.raises(
            ValueError, match=f"double_quant=false is about a base in 4 bits, and the method is {method}"
        ):
            refuse_unused({"double_quant": False}, method=method, has_evaluation=False)
    refuse_unused({"eval_every": 0}, method="full", has_evaluation=False)
    refuse_unused({"eval_every": 5, "double_quant": False}, method="qlora", has_evaluation=True)
    refuse_unused({}, method="full", has_evaluation=False)
