"""How many expert servers are wanted, and that Serve can ask."""

import math
import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.config import ROOT
from deployments.experts.autoscaling import BUSY_SHARE, POLICY, BusyShare, ByBusyShare, target_of, wanted_servers

shares = st.lists(st.floats(0, 1), min_size=1, max_size=40)
targets = st.floats(0.05, 1)
numbers = st.integers(1, 60)


@given(shares=shares, target=targets, wanted=numbers)
def test_so_many_that_each_is_as_busy_as_it_may_be(shares: list[float], target: float, wanted: int) -> None:
    """Whatever was wanted before, when all servers have told."""
    number, work = wanted_servers(shares, len(shares), wanted, target), sum(shares)
    assert work / number <= target * (1 + 1e-6)
    assert number == 1 or work / (number - 1) > target * (1 - 1e-6)


@given(shares=shares, silent=st.integers(0, 20), target=targets, wanted=numbers)
def test_the_silent_change_nothing_that_is_not_certain(
    shares: list[float], silent: int, target: float, wanted: int
) -> None:
    def all_told(share: float) -> int:
        every = shares + [share] * silent
        return wanted_servers(every, len(every), wanted, target)

    number = wanted_servers(shares, len(shares) + silent, wanted, target)
    idle, alike = all_told(0.0), all_told(sum(shares) / len(shares))
    assert number in (idle, wanted, alike)
    assert number == wanted or not min(idle, alike) <= wanted <= max(idle, alike)


@given(running=st.integers(0, 60), wanted=st.integers(0, 60), target=targets)
def test_nothing_is_decided_while_none_has_told(running: int, wanted: int, target: float) -> None:
    assert wanted_servers([], running, wanted, target) == wanted


@pytest.mark.parametrize(
    ("shares", "running", "wanted", "expected"),
    [
        ([0.9, 0.9], 2, 2, 4),
        ([0.5, 0.5], 2, 2, 2),  # as it should be
        ([0.51, 0.5], 2, 2, 3),
        ([0.1, 0.1, 0.2], 3, 3, 1),
        ([0.0, 0.0], 2, 2, 1),  # never none
        ([0.7, 0.8], 3, 3, 3),  # the third has just started and has taken nothing yet
        ([0.4, 0.2], 3, 3, 2),  # even if the third does as much as these
    ],
)
def test_examples(shares: list[float], running: int, wanted: int, expected: int) -> None:
    assert wanted_servers(shares, running, wanted, 0.5) == expected


def test_the_busy_share_is_of_the_time_since_it_was_asked_last() -> None:
    clock, busy = [100.0], [5.0]
    share = BusyShare(lambda: busy[0], lambda: clock[0])
    assert share() == 0.0
    clock[0], busy[0] = 104.0, 6.0
    assert share() == 0.25
    clock[0] = 106.0
    assert share() == 0.0
    clock[0], busy[0] = 107.0, 7.5  # a call that began before ends within
    assert share() == 1.0


def test_serve_takes_the_policy_of_the_example() -> None:
    text = (ROOT / "configs/smollm2-moe-autoscaled.yaml").read_text()
    application = yaml.safe_load(text)["applications"][0]
    said = application["deployments"][-1]["autoscaling_config"]
    config = AutoscalingConfig(**said)
    assert config.min_replicas >= application["args"]["models"][0]["experts"]["copies"]
    assert config.policy.policy_function == POLICY
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    target = said["policy"]["policy_kwargs"]["target_busy_share"]
    assert policy(context(config, {"a": 1.0, "b": 0.5})) == (math.ceil(1.5 / target), {})
    assert policy(context(config, {})) == (2, {})


def context(config: AutoscalingConfig, told: dict[str, float]) -> AutoscalingContext:
    """Of two servers."""
    deployment = DeploymentID("experts-m", "moray")
    replicas: dict[str, Any] = {name: ReplicaID(name, deployment) for name in ("a", "b")}
    by_replica = {replicas[name]: share for name, share in told.items()}
    return AutoscalingContext(
        deployment_id=deployment, deployment_name=deployment.name, app_name=deployment.app_name,
        current_num_replicas=2, target_num_replicas=2, running_replicas=list(replicas.values()),
        total_num_requests=0, total_queued_requests=0, raw_metrics=None,
        aggregated_metrics=lambda: {BUSY_SHARE: by_replica} if told else {},
        capacity_adjusted_min_replicas=2, capacity_adjusted_max_replicas=4, policy_state={},
        last_scale_up_time=None, last_scale_down_time=None, current_time=time.time(), config=config,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_busy_share": 0}, r"target_busy_share is 0; it must be a number above 0"),
        ({"target_busy_share": 1.5}, r"target_busy_share is 1\.5"),
        ({"target_busy_share": "half"}, r"target_busy_share is 'half'"),
        ({"target": 0.5}, r"policy_kwargs has target; it may have target_busy_share"),
    ],
)
def test_faulty_options_are_refused_but_do_not_stop_the_controller(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target_of(options)
    assert ByBusyShare(**options)(context(AutoscalingConfig(max_replicas=4), {"a": 1.0, "b": 0.8})) == (4, {})
