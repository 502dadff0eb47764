"""Evergreen's software-defined assets. Importing the package imports neither Dagster nor torch: engine and
gateway processes use parts of it without either."""

from typing import Any

__all__ = ["BaseModels", "Customization"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ml_assets import customization

        return getattr(customization, name)
    raise AttributeError(f"module 'ml_assets' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
