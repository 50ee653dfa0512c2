"""Who we are to others: Modal, the Hugging Face Hub."""

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from modal_eval.config.request import REPOSITORY


class ModalAccount(Block):
    """Who rents GPUs on Modal, for workers that nobody has logged in on."""

    _block_type_name = "Modal Account"
    _block_type_slug = "modal-account"
    _description = "Who rents GPUs on Modal: the token that `modal token new` makes."

    token_id: SecretStr
    token_secret: SecretStr
    environment: str | None = Field(default=None, description="Modal's environment; empty takes the account's default.")

    def variables(self) -> dict[str, str]:
        """What Modal's client reads."""
        named = {"MODAL_ENVIRONMENT": self.environment} if self.environment else {}
        return {
            "MODAL_TOKEN_ID": self.token_id.get_secret_value(),
            "MODAL_TOKEN_SECRET": self.token_secret.get_secret_value(),
            **named,
        }


class HubRepository(Block):
    """Where finished runs are pushed, and in whose name."""

    _block_type_name = "Hub Repository"
    _block_type_slug = "hub-repository"
    _description = "The data-set repository on the Hugging Face Hub that finished runs are pushed to."

    repository: str = Field(pattern=f"^{REPOSITORY}$", description="`owner/name`; made private if it is new.")
    token: SecretStr | None = Field(default=None, description="Empty takes the worker's own login.")

    def variables(self) -> dict[str, str]:
        """What the Hub's client reads."""
        return {"HF_TOKEN": self.token.get_secret_value()} if self.token else {}
