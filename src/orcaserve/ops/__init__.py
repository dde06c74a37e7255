"""Floor 3: the operators. Torch starts here."""
