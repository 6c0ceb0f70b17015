"""Policies by name."""

import pytest

from maestro_agents.protocol import ConfigError
from maestro_backend.scheduler.policies import POLICIES, policy


def test_every_policy_knows_its_own_name() -> None:
    assert {name: policy(name).name for name in POLICIES} == {name: name for name in POLICIES}


def test_an_unknown_policy_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="fcfs, maestro"):
        policy("sjf")
