"""What arrives on the host: hand-over and history."""
