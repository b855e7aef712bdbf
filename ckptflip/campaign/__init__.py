"""Campaigns: many trials, each one faulty resume, in one store; specs, executors, statistics."""
