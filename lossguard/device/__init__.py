"""On the device: taps, signals, tape, gate. Nothing here reads a value."""
