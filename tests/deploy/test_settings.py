"""Profiles and build settings: what is understood, and what is refused in one line."""

from __future__ import annotations

import pytest

from deploy.settings import BuildSettings, Profile
from qat.base.errors import UserError


def test_profiles_are_parsed():
    assert Profile.parse("1,8,32") == Profile(1, 8, 32)
    assert Profile.parse(" 4 , 4, 16") == Profile(4, 4, 16)
    assert Profile.parse("128") == Profile(128, 128, 128)
    assert str(Profile(1, 8, 32)) == "1,8,32"
    assert Profile(4, 4, 4).fixed
    assert not Profile(1, 4, 4).fixed


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4", "a", "1;2;3", "1,8.0,32"])
def test_what_is_not_a_profile(text):
    with pytest.raises(UserError, match="give MIN,OPT,MAX"):
        Profile.parse(text)


@pytest.mark.parametrize("text", ["0,1,2", "2,1,4", "1,8,4", "0", "-1"])
def test_sizes_that_contradict(text):
    with pytest.raises(UserError, match="must have 1 <= min <= opt <= max"):
        Profile.parse(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profiles": ()}, "there is no profile"),
        ({"profiles": (Profile(1, 1, 1), Profile(2, 4, 8))}, "fixed batch allows no other profile"),
        ({"optimization_level": 6}, "must be 0 to 5"),
        ({"optimization_level": -1}, "must be 0 to 5"),
        ({"workspace_gib": 0.0}, "more than 0"),
        ({"timing_iterations": 0}, "at least"),
        ({"aux_streams": -1}, "at least"),
    ],
)
def test_settings_that_no_builder_takes(settings, message):
    with pytest.raises(UserError, match=message):
        BuildSettings(**settings)
