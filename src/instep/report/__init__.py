"""Reads tapes and says what a run, or each of several, gained and cost: in a page, and as one JSON document.

A pure function of what lies in run folders: neither torch nor an engine is imported.
"""
