"""Tests of packed weights."""
