"""Settings that would do nothing are refused, by hand."""

import pytest

from graft.base.idle import refuse_idle
from graft.finetune.sft_config import refuse_unused, resolve


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


def test_settings_of_the_loop_that_would_do_nothing() -> None:
    """Law: fine-tuning refuses what belongs to another optimizer or schedule, as pretraining does, and takes it where it acts."""
    for asked, on, message in (
        ({"soap_every": 3}, {"optimizer": "soap"}, "soap_every=3 is of SOAP; set optimizer=soap, or leave it out"),
        ({"decay_fraction": 0.5}, {"schedule": "wsd"}, "decay_fraction=0.5 is of the schedule wsd"),
    ):
        with pytest.raises(ValueError, match=message):
            refuse_idle(asked, resolve(asked, method="lora", n_rows=1))
        refuse_idle(asked | on, resolve(asked | on, method="lora", n_rows=1))
