import pytest

from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides
from modal_eval.stages.reporting import cost


def config(**overrides):
    return resolve("org/m", BenchmarkConfig(name="toy", env_id="toy"), Overrides(**overrides))


def held(gpus=1, starting_s=0.0, generated_s=0.0):
    return {"gpus": gpus, "since": "2026-01-01T00:00:00+00:00", "starting_s": starting_s, "generated_s": generated_s}


def test_gpus_are_paid_for_from_their_lease_to_the_end_of_generating_however_many_were_asked_for():
    run = config(vllm={"data_parallel_size": 8}, infra={"gpu_hour_price": 2.5})
    assert cost(run, [held(2, 600.0)], 3000.0) == {"gpu_seconds": 7200.0, "cost": 5.0}


def test_each_attempt_pays_for_the_gpus_that_it_had_also_where_its_server_never_came_up():
    attempts = [held(8, 100.0), held(2, 50.0, 400.0), held(4, 30.0, 500.0), held(0, 7.0, 500.0)]
    assert cost(config(), attempts, 900.0)["gpu_seconds"] == 8 * 500.0 + 2 * 150.0 + 4 * 30.0


def test_without_a_price_there_is_no_cost():
    assert cost(config(), [held(1, 600.0)], 3000.0) == {"gpu_seconds": 3600.0, "cost": None}


@pytest.mark.parametrize("servers", [[], [held(0, 5.0)]])
def test_a_run_that_holds_no_gpu_of_ours_has_no_gpu_seconds(servers):
    assert cost(config(infra={"gpu_hour_price": 3.6}), servers, 10.0) == {"gpu_seconds": None, "cost": None}
