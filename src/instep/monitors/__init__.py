"""What shows a run while it trains."""
