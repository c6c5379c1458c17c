"""Criteria: how important is each channel of a group? One function each, found by name in one table."""
