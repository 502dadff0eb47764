"""The gateway that answers for the customizations, as a resource."""

from pathlib import Path

import dagster as dg
from pydantic import Field

from ml_assets.endpoints.gateway.client import GatewayClient
from ml_assets.endpoints.gateway.keys import ADMIN_KEY_FILE
from ml_assets.settings import Settings


class GatewayResource(dg.ConfigurableResource):
    """HTTP client of the gateway, with its admin key."""

    url: str = Field(
        default_factory=lambda: Settings.from_env().gateway_url, description="Address of the gateway."
    )
    admin_key_file: str = Field(
        default_factory=lambda: str(Settings.from_env().home / ADMIN_KEY_FILE),
        description="File with an API key of the scopes 'admin' and '*'; the gateway writes it at its start.",
    )

    def client(self) -> GatewayClient:
        """A client; close it after use (`with`). Raises GatewayError when there is no admin key."""
        return GatewayClient.from_key_file(self.url, Path(self.admin_key_file))
