"""Assets over all customizations."""
