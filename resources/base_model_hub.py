"""How base models are reached: the hub's address and token, and where downloads are kept."""

import dataclasses
import os
from pathlib import Path

import dagster as dg
from pydantic import Field

from ml_assets.base_models.sources import HubAccess
from ml_assets.settings import Settings


class BaseModelHub(dg.ConfigurableResource):
    """Access to the sources of base models. Directories, files and wheels need no settings of it."""

    endpoint: str = Field(
        default_factory=lambda: HubAccess.from_env().endpoint,
        description="Address of the Hugging Face hub or a mirror of it; default: HF_ENDPOINT.",
    )
    token: str = Field(
        default_factory=lambda: os.environ.get("HF_TOKEN", ""),
        description="Access token for private and gated repositories; default: HF_TOKEN.",
    )
    home: str = Field(
        default_factory=lambda: str(Settings.from_env().home),
        description="Data directory for downloads; default: EVERGREEN_HOME.",
    )

    def access(self) -> HubAccess:
        return HubAccess(self.endpoint, self.token, lambda name: dg.EnvVar(name).get_value())

    def settings(self) -> Settings:
        return dataclasses.replace(Settings.from_env(), home=Path(self.home).expanduser().resolve())
