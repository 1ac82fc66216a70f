"""The units as notebooks."""
