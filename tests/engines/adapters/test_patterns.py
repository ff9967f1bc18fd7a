"""Patterns are read as Python's `re` reads them, or refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loraplex.engines.adapters import patterns
from loraplex.engines.errors import AdapterInvalid

_PARTS = st.sampled_from(
    [*"qaz_.*+?|()[]^-&:$~#{}1\\", ".*", "(?:", "(?!", "(?i)", r"\d", r"\.", r"\1",
     "{2}", "{,2}", "{1,}", "{0,3}", "{e}", "{e<=2}", "[:alpha:]"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(pattern=st.lists(_PARTS, max_size=7).map("".join), text=st.text("qaz_.1-[{}:e", min_size=1, max_size=6))
def test_match_is_that_of_re_wherever_the_pattern_is_accepted(pattern: str, text: str) -> None:
    for wrapped in (patterns.WHOLE, patterns.ENDING, patterns.PARENT):
        try:
            patterns.check("target_modules", pattern, wrapped)
        except AdapterInvalid:
            assume(False)
        try:
            found = patterns.match(wrapped, pattern, text)
        except AdapterInvalid:  # valid, but beyond what the deadline allows or the wrapping leaves whole
            continue
        assert bool(found) == bool(re.match(wrapped.format(pattern), text))


@pytest.mark.parametrize(
    "pattern",
    [r".*(q|v)_proj", r"model\.layers\.\d+\.(?:q|v)_proj", r"q_pro[j\]]", r"layers\.\d{1,2}\.q", r"(?!.*vision).*q",
     r"h\{e\}", "[^[a]q", "q{2}", "q{2,}", "q{,2}", r"^q_proj$", r"\bq_proj\b", "(?P<n>q)(?P=n)"],
)  # fmt: skip
def test_pattern_that_both_read_alike_is_accepted(pattern: str) -> None:
    patterns.check("target_modules", pattern)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("part", ["[", "(?#[", "{", "\\[", "[]"])
def test_long_pattern_is_checked_in_time(part: str) -> None:
    with pytest.raises(AdapterInvalid):
        patterns.check("target_modules", f"(?x)#{part * 300_000}\n(")
