import pytest

from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides
from modal_eval.stages.reporting import cost

SECONDS = {"deploy": 600.0, "generate": 3000.0, "score": 9999.0}


def config(**overrides):
    return resolve("org/m", BenchmarkConfig(name="toy", env_id="toy"), Overrides(**overrides))


def test_gpus_are_paid_for_from_deployment_to_the_end_of_generating_and_not_for_scoring():
    run = config(vllm={"data_parallel_size": 2}, infra={"gpu_hour_price": 2.5})
    assert cost(run, SECONDS) == {"gpu_seconds": 7200.0, "cost": 5.0}


def test_without_a_price_there_is_no_cost():
    assert cost(config(), SECONDS) == {"gpu_seconds": 3600.0, "cost": None}


@pytest.mark.parametrize("infra", [{"base_url": "http://127.0.0.1:1/v1"}, {"engine": "llamacpp"}])
def test_a_run_that_holds_no_gpu_of_ours_has_no_gpu_seconds(infra):
    assert cost(config(infra=infra), SECONDS) == {"gpu_seconds": None, "cost": None}
