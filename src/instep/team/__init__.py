"""Processes: started, watched, replaced and ended."""
