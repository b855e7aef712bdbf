"""Figures, tables and pages of what runs and campaigns recorded."""
