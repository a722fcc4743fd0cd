"""The loop over regions."""
