"""From file to file: a program whose input, outputs and values between sweeps live in files, whatever the framework."""
