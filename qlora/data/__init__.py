"""From files to tokens and labels: sources → formats → rendering → lint; calibration draws from the same path."""
