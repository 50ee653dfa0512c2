"""Where checkpoints land."""

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from modal_eval.checkpoints.s3_objects import Access


class CheckpointBucket(Block):
    """A place on S3 below which checkpoints land, and how it is reached.

    What is left empty is boto3's own business on the machine that runs the flow: environment, profile, instance role.
    """

    _block_type_name = "Checkpoint Bucket"
    _block_type_slug = "checkpoint-bucket"
    _description = "A place on S3 below which checkpoints land, its notifications, and how it is reached."

    address: str = Field(pattern="^s3://[^/]+", description="`s3://BUCKET/PREFIX`; checkpoints at any depth below it.")
    queue_url: str | None = Field(
        default=None, description="SQS queue of the bucket's notifications, which no other reader may have."
    )
    memory: str | None = Field(
        default=None,
        description="Where it is remembered what was announced: `s3://…` for watches on several machines, or a folder.",
    )
    endpoint_url: str | None = Field(default=None, description="For an S3 that is not Amazon's.")
    region: str | None = None
    profile: str | None = Field(default=None, description="Name of a profile in ~/.aws/config of the worker.")
    access_key_id: SecretStr | None = None
    secret_access_key: SecretStr | None = None

    def access(self) -> Access:
        """How boto3 gets there."""
        return Access(
            endpoint_url=self.endpoint_url,
            region=self.region,
            profile=self.profile,
            access_key_id=self.access_key_id.get_secret_value() if self.access_key_id else None,
            secret_access_key=self.secret_access_key.get_secret_value() if self.secret_access_key else None,
        )
