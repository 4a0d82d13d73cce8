"""Offer the methods that DST is compared with, on the same masked layers: one rule per module."""
