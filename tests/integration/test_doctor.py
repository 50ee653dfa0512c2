"""`modal-eval doctor`: what is missing is named with its mending, and no secret is shown."""

import json

from tests.support.aws import aws_server
from tests.support.modal_account import account

SECRET = "hf_sesame_open_yourself"


def found(cli, *arguments, expect=0):
    ended = cli("doctor", "--json", *arguments, expect=expect)
    return {one["what"]: one for one in json.loads(ended.stdout)}


def test_a_machine_without_a_gpu_lacks_it_for_a_node_and_for_nothing_else(cli, machine):
    machine.set("count", "0")
    cli.env = machine.env(cli.env)
    lacking = found(cli, "--route=node", expect=1)["NVIDIA GPU and driver"]
    assert lacking["state"] == "missing"
    assert "infra.target=modal" in lacking["mend"]
    found(cli, "--route=endpoint")


def test_eight_gpus_are_found(cli, machine):
    cli.env = machine.env(cli.env)
    assert found(cli, "--route=node")["NVIDIA GPU and driver"]["found"].startswith("8 × ")


def test_a_token_is_said_to_be_present_and_never_shown(cli):
    with aws_server(cli.folder) as aws:
        cli.env |= {
            "HF_TOKEN": SECRET,
            **aws.env,
            "AWS_ACCESS_KEY_ID": "AKIA" + SECRET,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
        ended = cli("doctor")
        assert SECRET not in ended.stdout + ended.stderr
        states = found(cli)
    assert (states["Hugging Face token"]["state"], states["S3 access"]["state"]) == ("ok", "ok")
    assert found(cli)["S3 access"]["found"] == "S3 was not reached", "it has been ended"


def test_modals_secret_is_looked_for_in_the_account(cli):
    for given, state in (((), "missing"), (("--secret", "huggingface"), "ok")):
        with account(cli.folder / state, *given) as modal:
            cli.env |= modal.variables
            seen = found(cli, "--route=modal", expect=0 if given else 1)["Modal secret huggingface"]
        assert seen["state"] == state
        assert ("modal secret create huggingface" in seen["mend"]) == (not given)


def test_a_prefect_server_that_is_away_fails_every_route(cli):
    cli.env["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    assert "unset PREFECT_API_URL" in found(cli, expect=1)["Prefect server"]["mend"]


def test_without_modals_token_the_modal_route_is_told_how_to_get_one(cli):
    cli.env |= {"MODAL_CONFIG_PATH": str(cli.folder / "none.toml")}
    assert "modal token new" in found(cli, "--route=modal", expect=1)["Modal token"]["mend"]
