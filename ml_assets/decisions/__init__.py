"""What is done about a customization that decays: decided on evidence, within a budget, on the record."""
