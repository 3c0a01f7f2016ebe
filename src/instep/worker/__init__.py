"""What one process computes, alike under every engine."""
