"""Log probabilities: those of PyTorch, ranks among equals, and numbers of alternatives out of range."""

from __future__ import annotations

import numpy as np
import pytest

from runtimes.errors import InputError
from runtimes.text.logprobs import check_top, token_logprobs


def test_logprobs_equal_pytorchs() -> None:
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(0, 4, 50_000).astype(np.float32)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), dim=0)
    top = torch.topk(expected, 7)
    found = token_logprobs(logits, 1234, 7)
    assert found.token_id == 1234
    assert found.logprob == pytest.approx(expected[1234].item(), abs=2e-6)
    assert [i for i, _ in found.top] == top.indices.tolist()
    np.testing.assert_allclose([p for _, p in found.top], top.values.numpy(), atol=2e-6)
    assert found.rank == int((expected >= expected[1234]).sum())


def test_among_equals_the_lower_id_is_first_and_no_more_are_given_than_asked_for() -> None:
    logits = np.array([0.0, 2.0, 2.0, 2.0, -np.inf], np.float32)
    found = token_logprobs(logits, 2, 2)
    assert [i for i, _ in found.top] == [1, 2]
    assert found.rank == 3
    assert token_logprobs(logits, 2, 0).top == ()
    assert token_logprobs(logits, 4, 9).logprob == -np.inf
    assert len(token_logprobs(logits, 4, 9).top) == 5


def test_huge_logits_do_not_overflow() -> None:
    found = token_logprobs(np.array([3e38, -3e38, 3e38], np.float32), 0, 1)
    assert found.logprob == pytest.approx(-np.log(2))


@pytest.mark.parametrize("top", [-1, 132, 1.5, "3", True])
def test_another_number_of_alternatives_is_refused(top: object) -> None:
    with pytest.raises(InputError, match=r"logprobs .*expected an integer from 0 to 131"):
        check_top("logprobs", top, 131)  # type: ignore[arg-type]
    assert check_top("logprobs", None, 131) is None
    assert check_top("logprobs", 0, 131) == 0
