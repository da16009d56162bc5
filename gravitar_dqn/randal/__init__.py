"""RANDAL's published interface: its names, and its trainer."""
