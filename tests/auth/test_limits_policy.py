"""What limits of a tenant and of a key mean together."""

from __future__ import annotations

import msgspec
import pytest

from loraplex.auth.limits.policy import Limits, Policy


def test_unset_limits_are_inherited_and_set_ones_kept() -> None:
    defaults = Limits(requests_per_minute=10, max_tokens=5)
    assert Limits(max_tokens=7).over(defaults) == Limits(requests_per_minute=10, max_tokens=7)


@pytest.mark.parametrize(
    ("tenant", "key", "model", "expected"),
    [
        (None, None, "any", True),
        (("team/*",), None, "team/x", True),
        (("team/*",), None, "other", False),
        (("team/*",), ("*-small",), "team/x-small", True),
        (("team/*",), ("*-small",), "team/x", False),
        (("a[b]?",), None, "ab1", False),
        (("a[b]?",), None, "a[b]?", True),
        ((), None, "any", False),
    ],
)
def test_model_must_pass_the_patterns_of_both(
    tenant: tuple[str, ...] | None, key: tuple[str, ...] | None, model: str, expected: bool
) -> None:
    assert Policy(tenant=Limits(allowed_models=tenant), key=Limits(allowed_models=key)).may_use(model) is expected


@pytest.mark.parametrize(
    ("allowed", "address", "expected"),
    [
        (None, None, True),
        (("10.0.0.0/8",), "10.1.2.3", True),
        (("10.0.0.0/8",), "::ffff:10.1.2.3", True),
        (("10.0.0.0/8",), "11.1.2.3", False),
        (("::1", "192.0.2.7"), "192.0.2.7", True),
        (("::1",), "192.0.2.7", False),
        (("10.0.0.0/8",), None, False),
        (("10.0.0.0/8",), "unix:", False),
    ],
)
def test_address_must_be_in_the_list(allowed: tuple[str, ...] | None, address: str | None, expected: bool) -> None:
    assert Policy(key=Limits(allowed_ips=allowed)).admits(address) is expected


def test_key_has_at_most_its_tenants_weight_and_max_tokens() -> None:
    tenant = Limits(weight=2.0, max_tokens=100, priority=1)
    generous = Policy(tenant=tenant, key=Limits(weight=9.0, max_tokens=900, priority=5))
    assert (generous.weight, generous.max_tokens, generous.priority) == (2.0, 100, 5)
    modest = Policy(tenant=tenant, key=Limits(weight=0.5, max_tokens=9))
    assert (modest.weight, modest.max_tokens, modest.priority) == (0.5, 9, 1)
    assert (Policy().weight, Policy().max_tokens, Policy().priority) == (1.0, None, 0)


def test_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.1/8"):
        Limits(allowed_ips=("10.0.0.1/8",)).check()


@pytest.mark.parametrize("field", ["requests_per_minute", "concurrent_requests", "max_tokens", "weight"])
def test_limit_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert({field: 0}, Limits)
