"""What every subsystem needs and that knows nothing of involution."""
