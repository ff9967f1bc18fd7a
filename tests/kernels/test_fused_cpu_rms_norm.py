"""The normalisation in C against the formula and transformers' own modules: any rows and widths, both types."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loraplex.kernels.fused.cpu_rms_norm import RmsNorm, is_available, rms_norm_reference

CPU = torch.device("cpu")
# float32: the order of sums. bfloat16: half a unit in the last of 8 bits for each rounding.
TOLERANCES = {(torch.float32, False): 2e-6, (torch.bfloat16, False): 2**-8, (torch.bfloat16, True): 2**-7}

pytestmark = pytest.mark.skipif(not is_available(torch.float32, CPU), reason="the kernel was not built: no compiler")


@pytest.mark.parametrize(("dtype", "rounds_twice"), TOLERANCES)
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 17), (5, 576), (2, 3, 100), (200, 513)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_rms_norm_equals_the_formula(
    dtype: torch.dtype, rounds_twice: bool, shape: tuple[int, ...], scale: float, threads: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * scale).to(dtype)
    weight = torch.randn(shape[-1], generator=generator)
    y = RmsNorm(weight, 1e-5, dtype, rounds_twice=rounds_twice)(x)
    expected = rms_norm_reference(x, weight, 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCES[dtype, rounds_twice], atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_rounds_where_transformers_does(dtype: torch.dtype) -> None:
    """Llama before the weight, Gemma after it: all but a few numbers are equal.

    A quotient whose sum was made in another order may round the other way, and its product after it.
    """
    llama, gemma = LlamaRMSNorm(576, eps=1e-5), Gemma2RMSNorm(576, eps=1e-5)
    for module, offset, rounds_twice in ((llama, 0, True), (gemma, 1, False)):
        torch.nn.init.normal_(module.weight)
        module.to(dtype)
        x = torch.randn(64, 576).to(dtype)
        y = RmsNorm(offset + module.weight.detach().float(), 1e-5, dtype, rounds_twice=rounds_twice)(x)
        expected = module(x)
        torch.testing.assert_close(y, expected, rtol=1e-6 if dtype == torch.float32 else 2**-6, atol=0)
        if dtype == torch.bfloat16:
            assert (y != expected).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_in_any_company_to_the_last_bit(dtype: torch.dtype, threads: int) -> None:
    norm = RmsNorm(torch.randn(600), 1e-6, dtype, rounds_twice=False)
    x = torch.randn(130, 600).to(dtype)
    together = norm(x)
    for begin, end in ((0, 1), (5, 7), (60, 130), (129, 130)):
        assert torch.equal(norm(x[begin:end]), together[begin:end])


def test_rows_may_lie_apart_and_what_is_not_a_number_stays_in_its_row() -> None:
    norm = RmsNorm(torch.randn(40), 1e-6, torch.bfloat16, rounds_twice=True)
    x = torch.randn(4, 6, 40).bfloat16()
    assert torch.equal(norm(x.transpose(0, 1)), norm(x).transpose(0, 1))
    x[1, 2, 3] = float("nan")
    assert norm(x).isnan().any(-1).sum() == 1


def test_kernel_is_for_cpus_and_types_it_knows() -> None:
    assert not is_available(torch.float16, CPU)
    assert not is_available(torch.float32, torch.device("cuda"))


@pytest.mark.parametrize("x", [torch.ones(2, 40), torch.ones(2, 39).bfloat16()], ids=["type", "width"])
def test_rows_of_another_type_or_width_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"the weight 40 for torch\.bfloat16"):
        RmsNorm(torch.ones(40), 1e-6, torch.bfloat16, rounds_twice=True)(x)
