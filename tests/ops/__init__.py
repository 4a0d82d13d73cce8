"""Tests of the operations: what they compute, refuse, save and compile to."""
