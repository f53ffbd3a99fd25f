"""Where S3 is and with which credentials: what the ordinary AWS environment says, read by botocore.

Nothing here takes a secret from a URL or a configuration of this project.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypedDict

from storage.errors import ConfigError


class Credential(TypedDict):
    """One set of keys, in the form that obstore asks for."""

    access_key_id: str
    secret_access_key: str
    token: str | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach S3.

    Args:
        endpoint: Base URL of an S3-compatible server; None for AWS itself.
        region: Name of the region; servers other than AWS accept any.
        credential: Gives the current keys, refreshed where they expire. Never printed.
    """

    endpoint: str | None
    region: str
    credential: Callable[[], Credential] = field(repr=False)


def resolve(thing: str = "s3") -> Access:
    """Read the AWS environment: variables, shared credentials and configuration files, instance roles.

    The endpoint is AWS_ENDPOINT_URL_S3, else AWS_ENDPOINT_URL, else `endpoint_url` of the profile's `services` section
    for s3, else of the profile, which is the order of AWS's own tools.

    Raises:
        ConfigError: unreadable or contradictory configuration, or no credentials; `thing` says what they were for.
    """
    import botocore.session  # imported when used: it costs a third of a second
    from botocore.exceptions import BotoCoreError

    session = botocore.session.get_session()
    try:
        credentials = session.get_credentials()
        region = session.get_config_variable("region") or os.environ.get("AWS_REGION") or "us-east-1"
        profile = session.get_scoped_config()
        services = session.full_config.get("services", {}).get(profile.get("services", ""), {})
    except BotoCoreError as error:
        raise ConfigError(
            "the AWS configuration",
            expected="readable files and an existing profile",
            found=str(error),
            remedy="check AWS_PROFILE, AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE",
        ) from error
    if credentials is None:
        raise ConfigError(
            thing,
            expected="credentials in the AWS environment",
            found="none",
            remedy="set AWS_SHARED_CREDENTIALS_FILE and AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or services.get("s3", {}).get("endpoint_url")
        or profile.get("endpoint_url")
    )

    def credential() -> Credential:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": getattr(credentials, "_expiry_time", None),
        }

    return Access(str(endpoint).rstrip("/") if endpoint else None, str(region), credential)
